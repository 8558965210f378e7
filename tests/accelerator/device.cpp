// A device of torch that has its own name and memory and calculates with the CPU's kernels.
//
// What it shares with a GPU: a tensor lies on it or it does not, an operator that gets tensors of two devices fails, results
// reach the host by copies and each of these waits, generators belong to a device, and collectives take tensors of the device
// only. It has no kernels, streams or precision of its own.

#include <torch/extension.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/library.h>

#include <set>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 8;
thread_local c10::DeviceIndex current = 0;

py::object* on_wait = nullptr;

// Tell Python that the host waits for the device here.
void wait(const std::string& reason) {
  if (!on_wait) return;
  py::gil_scoped_acquire held;
  (*on_wait)(reason);
}

bool ours(const c10::Device& device) {
  return device.type() == kDevice;
}

c10::Device here(c10::DeviceIndex index = -1) {
  return c10::Device(kDevice, index < 0 ? current : index);
}

// Memory ------------------------------------------------------------------------------------------------------------------

using c10::CachingAllocator::StatType;
c10::CachingAllocator::Stat allocated;
std::mutex allocating;

void account(int64_t bytes) {
  std::lock_guard<std::mutex> lock(allocating);
  bytes < 0 ? allocated.decrease(-bytes) : allocated.increase(bytes);
}

// Memory of the device, and what keeps it: a block of its own, or a storage that a kernel of the CPU has made.
struct Block {
  size_t bytes;
  void* own;
  c10::Storage storage;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  account(-static_cast<int64_t>(block->bytes));
  std::free(block->own);
  delete block;
}

struct Memory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* place = bytes ? std::malloc(bytes) : nullptr;
    TORCH_CHECK(place || !bytes, "out of memory");
    account(bytes);
    return {place, new Block{bytes, place, {}}, &free_block, here()};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[static_cast<size_t>(StatType::AGGREGATE)] = allocated;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override { allocated.reset_accumulated(); }
  void resetPeakStats(c10::DeviceIndex) override { allocated.reset_peak(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    const size_t total = size_t{80} << 30;
    return {total - allocated.current, total};
  }
};
Memory memory;

void release_storage(void* kept) {
  delete static_cast<c10::Storage*>(kept);
}

// The memory of a storage, which it keeps alive, as that of another device.
c10::DataPtr memory_on(const c10::Storage& storage, c10::Device device) {
  if (!ours(device)) return {storage.mutable_data(), new c10::Storage(storage), &release_storage, device};
  account(storage.nbytes());
  return {storage.mutable_data(), new Block{storage.nbytes(), nullptr, storage}, &free_block, device};
}

c10::Storage storage_on(const c10::Storage& storage, c10::Device device) {
  auto* allocator = ours(device) ? &memory : c10::GetAllocator(c10::DeviceType::CPU);
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), memory_on(storage, device), allocator, /*resizable=*/true);
}

at::Tensor with_shape_of(const at::Tensor& like, at::Tensor made) {
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}

at::Tensor tensor_on(const at::Tensor& like, c10::Storage storage, c10::DispatchKey key) {
  return with_shape_of(like, at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype()));
}

at::Tensor on_cpu(const at::Tensor& tensor) {
  return tensor_on(tensor, storage_on(tensor.storage(), c10::Device(c10::DeviceType::CPU)), c10::DispatchKey::CPU);
}

// Random numbers ----------------------------------------------------------------------------------------------------------

struct Generator final : c10::GeneratorImpl {
  explicit Generator(c10::DeviceIndex index)
      : Generator(index, at::make_generator<at::CPUGeneratorImpl>()) {}
  Generator(c10::DeviceIndex index, at::Generator drawn)
      : c10::GeneratorImpl(c10::Device(kDevice, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), cpu(std::move(drawn)) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(device_.index(), cpu.clone()); }

  at::Generator cpu;
};

at::Generator& default_generator(c10::DeviceIndex index) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (c10::DeviceIndex i = 0; i < kDevices; ++i) made.push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return all.at(index < 0 ? current : index);
}

at::Generator cpu_generator(const at::Generator& generator) {
  TORCH_CHECK(
      generator.device().type() == kDevice, "Expected a 'simulated' device type for generator but found '",
      generator.device().type(), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->cpu;
}

// Operators ---------------------------------------------------------------------------------------------------------------

// Copies between host and device, and what indexes with tensors of the host, as CUDA allows it.
const std::set<std::string> kMixed = {"aten::_copy_from", "aten::_copy_from_and_resize", "aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"};
// The host must know values of the device to go on.
const std::set<std::string> kWaits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::bincount"};

std::string name_of(const c10::OperatorHandle& op) {
  const auto& name = op.operator_name();
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

struct Call {
  std::string name;
  std::vector<std::pair<at::Tensor, at::Tensor>> inputs; // on the device, and their memory as the CPU's
  bool on_device = false; // a tensor or a device among the arguments is ours
  bool host = false; // a tensor of the host with dimensions
};

at::Tensor to_cpu(Call& call, const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  if (!ours(tensor.device())) {
    call.host |= tensor.dim() > 0;
    return tensor;
  }
  call.on_device = true;
  for (auto& [device, cpu] : call.inputs)
    if (device.is_same(tensor)) return cpu;
  call.inputs.emplace_back(tensor, on_cpu(tensor));
  return call.inputs.back().second;
}

void argument_to_cpu(Call& call, c10::IValue& value) {
  if (value.isTensor()) {
    value = to_cpu(call, value.toTensor());
  } else if (value.isTensorList()) {
    std::vector<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(to_cpu(call, tensor));
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      list.push_back(tensor ? std::optional<at::Tensor>(to_cpu(call, *tensor)) : std::nullopt);
    value = list;
  } else if (value.isDevice() && ours(value.toDevice())) {
    call.on_device = true;
    value = c10::Device(c10::DeviceType::CPU);
  } else if (value.isGenerator()) {
    value = cpu_generator(value.toGenerator());
  }
}

at::Tensor to_device(const Call& call, const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  for (const auto& [device, cpu] : call.inputs) {
    if (cpu.is_same(tensor)) { // written in place, perhaps resized
      if (cpu.storage().data() != device.storage().data()) {
        device.storage().set_data_ptr_noswap(memory_on(cpu.storage(), device.device()));
        device.storage().unsafeGetStorageImpl()->set_nbytes(cpu.storage().nbytes());
      }
      if (device.sizes() != tensor.sizes() || device.strides() != tensor.strides())
        device.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
      return device;
    }
  }
  for (const auto& [device, cpu] : call.inputs)
    if (cpu.storage().is_alias_of(tensor.storage())) { // a view, which has the keys of what it shows
      auto view = at::detail::make_tensor<c10::TensorImpl>(
          c10::TensorImpl::VIEW, c10::Storage(device.storage()), device.key_set(), tensor.dtype());
      return with_shape_of(tensor, std::move(view));
    }
  return tensor_on(tensor, storage_on(tensor.storage(), here()), c10::DispatchKey::PrivateUse1);
}

void result_to_device(const Call& call, c10::IValue& value) {
  if (value.isTensor()) {
    value = to_device(call, value.toTensor());
  } else if (value.isTensorList()) {
    std::vector<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(to_device(call, tensor));
    value = list;
  }
}

void any_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto arguments = op.schema().arguments().size();
  Call call{name_of(op)};
  for (auto i = stack->size() - arguments; i < stack->size(); ++i) argument_to_cpu(call, (*stack)[i]);
  TORCH_CHECK(
      !call.host || !call.on_device || kMixed.count(call.name),
      "Expected all tensors to be on the same device, but ", call.name, " got tensors of the host and of the simulated device");
  if (kWaits.count(call.name)) wait(call.name);
  if (call.host && call.name.rfind("aten::index", 0) == 0) wait(call.name + " with indices of the host");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  if (call.name == "aten::_local_scalar_dense") return;
  const auto results = op.schema().returns().size();
  for (auto i = stack->size() - results; i < stack->size(); ++i) result_to_device(call, (*stack)[i]);
}

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const auto type = c10::scalarTypeToTypeMeta(dtype.value_or(at::get_default_dtype_as_scalartype()));
  const auto bytes = at::detail::computeStorageNbytesContiguous(size, type.itemsize());
  auto data = memory.allocate(bytes);
  data.unsafe_set_device(here(device ? device->index() : -1));
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, std::move(data), &memory, /*resizable=*/true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type);
  made.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Preserve) made.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return made;
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::Device> device, std::optional<bool> pinned) {
  const auto type = dtype.value_or(at::get_default_dtype_as_scalartype());
  const auto items = at::detail::computeStorageNbytes(size, stride, 1);
  auto made = empty({static_cast<int64_t>(items)}, type, layout, device, pinned, std::nullopt);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return made;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool out = ours(from.device()) && !ours(to.device()), in = !ours(from.device()) && ours(to.device());
  if (out && !non_blocking) wait("a copy to the host");
  if (in && !non_blocking && from.dim() > 0) wait("a copy from the host");
  (ours(to.device()) ? on_cpu(to) : to).copy_(ours(from.device()) ? on_cpu(from) : from);
  return to;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const int64_t items = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(storage), 0, {items}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  const auto bytes = at::detail::computeStorageNbytesContiguous(size, self.dtype().itemsize(), self.storage_offset());
  if (bytes > self.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

at::Tensor convolution(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  TORCH_CHECK(ours(input.device()) && ours(weight.device()), "Expected all tensors to be on the same device, but a convolution got tensors of the host and of the simulated device");
  const auto given = bias && bias->defined() ? std::optional<at::Tensor>(on_cpu(*bias)) : std::nullopt;
  const auto made = at::convolution(on_cpu(input), on_cpu(weight), given, stride, padding, dilation, transposed, output_padding, groups);
  return tensor_on(made, storage_on(made.storage(), here()), c10::DispatchKey::PrivateUse1);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  const int64_t outputs = transposed ? weight.size(1) * groups : weight.size(0);
  auto [a, b, c] = at::convolution_backward(
      on_cpu(grad), on_cpu(input), on_cpu(weight), at::OptionalIntArrayRef({outputs}), stride, padding, dilation, transposed,
      output_padding, groups, wanted);
  const auto back = [](const at::Tensor& t) {
    return t.defined() ? tensor_on(t, storage_on(t.storage(), here()), c10::DispatchKey::PrivateUse1) : t;
  };
  return {back(a), back(b), back(c)};
}

int64_t attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) {
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

// The device --------------------------------------------------------------------------------------------------------------

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override { return at::make_generator<Generator>(index < 0 ? current : index); }
  at::Device getDeviceFromPtr(void*) const override { return here(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return std::exchange(current, device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return device < 0 ? current : exchangeDevice(device); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto fresh = memory.allocate(bytes);
    if (const auto kept = std::min(bytes, storage.nbytes())) std::memcpy(fresh.get(), storage.data(), kept);
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device device) const override { return here(std::exchange(current, device.index())); }
  c10::Device getDevice() const override { return here(); }
  void setDevice(c10::Device device) const override { if (device.index() >= 0) current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { if (device.index() >= 0) current = device.index(); }
  c10::Stream getStream(c10::Device device) const override { return getDefaultStream(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, here(device.index())); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getDefaultStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getDefaultStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getDefaultStream(stream.device()); }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait("synchronize a stream"); }
  void synchronizeEvent(void*) const override { wait("synchronize an event"); }
  void synchronizeDevice(c10::DeviceIndex) const override { wait("synchronize the device"); }
  double elapsedTime(void*, void*, c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Collectives: gloo's, on the memory of the device's tensors ----------------------------------------------------------------

struct Collectives final : c10d::Backend {
  explicit Collectives(c10::intrusive_ptr<c10d::Backend> gloo)
      : c10d::Backend(gloo->getRank(), gloo->getSize()), gloo(std::move(gloo)) {}
  using Work = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<at::Tensor>;

  static at::Tensor one(const at::Tensor& tensor) {
    TORCH_CHECK(ours(tensor.device()), "No backend type associated with device type cpu: this collective takes tensors of the simulated device");
    return on_cpu(tensor);
  }
  static Tensors many(const Tensors& tensors) {
    Tensors made;
    for (const auto& tensor : tensors) made.push_back(one(tensor));
    return made;
  }
  static std::vector<Tensors> lists(const std::vector<Tensors>& all) {
    std::vector<Tensors> made;
    for (const auto& tensors : all) made.push_back(many(tensors));
    return made;
  }
  const std::string getBackendName() const override { return "simulated"; }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo->setTimeout(timeout); }
  Work broadcast(Tensors& a, const c10d::BroadcastOptions& o) override { auto x = many(a); return gloo->broadcast(x, o); }
  Work allreduce(Tensors& a, const c10d::AllreduceOptions& o) override { auto x = many(a); return gloo->allreduce(x, o); }
  Work reduce(Tensors& a, const c10d::ReduceOptions& o) override { auto x = many(a); return gloo->reduce(x, o); }
  Work allgather(std::vector<Tensors>& a, Tensors& b, const c10d::AllgatherOptions& o) override { auto x = lists(a); auto y = many(b); return gloo->allgather(x, y, o); }
  Work _allgather_base(at::Tensor& a, at::Tensor& b, const c10d::AllgatherOptions& o) override { auto x = one(a); auto y = one(b); return gloo->_allgather_base(x, y, o); }
  Work _reduce_scatter_base(at::Tensor& a, at::Tensor& b, const c10d::ReduceScatterOptions& o) override { auto x = one(a); auto y = one(b); return gloo->_reduce_scatter_base(x, y, o); }
  Work reduce_scatter(Tensors& a, std::vector<Tensors>& b, const c10d::ReduceScatterOptions& o) override { auto x = many(a); auto y = lists(b); return gloo->reduce_scatter(x, y, o); }
  Work allgather_into_tensor_coalesced(Tensors& a, Tensors& b, const c10d::AllgatherOptions& o) override { auto x = many(a); auto y = many(b); return gloo->allgather_into_tensor_coalesced(x, y, o); }
  Work reduce_scatter_tensor_coalesced(Tensors& a, Tensors& b, const c10d::ReduceScatterOptions& o) override { auto x = many(a); auto y = many(b); return gloo->reduce_scatter_tensor_coalesced(x, y, o); }
  Work gather(std::vector<Tensors>& a, Tensors& b, const c10d::GatherOptions& o) override { auto x = lists(a); auto y = many(b); return gloo->gather(x, y, o); }
  Work scatter(Tensors& a, std::vector<Tensors>& b, const c10d::ScatterOptions& o) override { auto x = many(a); auto y = lists(b); return gloo->scatter(x, y, o); }
  Work alltoall_base(at::Tensor& a, at::Tensor& b, std::vector<int64_t>& to, std::vector<int64_t>& from, const c10d::AllToAllOptions& o) override { auto x = one(a); auto y = one(b); return gloo->alltoall_base(x, y, to, from, o); }
  Work alltoall(Tensors& a, Tensors& b, const c10d::AllToAllOptions& o) override { auto x = many(a); auto y = many(b); return gloo->alltoall(x, y, o); }
  Work allreduce_coalesced(Tensors& a, const c10d::AllreduceCoalescedOptions& o) override { auto x = many(a); return gloo->allreduce_coalesced(x, o); }
  Work barrier(const c10d::BarrierOptions& o) override { return gloo->barrier(o); }

  c10::intrusive_ptr<c10d::Backend> gloo;
};

} // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention)
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&any_operator>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("resize_", &resize);
  // Of these torch has a second implementation, for devices without a kernel.
  for (const auto* name : {"native_group_norm", "native_layer_norm", "native_layer_norm_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&any_operator>());
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FP32)
  AT_FORALL_PROMOTE(PROMOTE)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(kDevice, &memory);
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("set_device", [](int index) { current = static_cast<c10::DeviceIndex>(index); });
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("default_generator", [](int index) { return default_generator(static_cast<c10::DeviceIndex>(index)); });
  m.def("on_wait", [](const py::object& call) { on_wait = new py::object(call); });
  m.def("collectives", [](const c10::intrusive_ptr<c10d::Backend>& gloo) -> c10::intrusive_ptr<c10d::Backend> { return c10::make_intrusive<Collectives>(gloo); });
}
