from __future__ import annotations

import pytest
import torch

from dmd2 import recipes
from dmd2.batch import Conditioning
from dmd2.config import Config
from dmd2.errors import Refused
from dmd2.models.adm import Adm, sinusoid
from dmd2.models.family import make_family
from dmd2.models.heads import ConvHead
from tests.conftest import adm


@pytest.fixture(scope="module")
def published() -> Adm:
    with torch.device("meta"):
        return Adm(recipes.IMAGENET64)


def test_imagenet64_has_the_published_number_of_parameters(published: Adm) -> None:
    """296 M (Karras et al. 2024, table 2, "ADM"; the class embedding counts)."""
    assert round(sum(p.numel() for p in published.parameters()) / 1e6) == 296


def test_imagenet64_bottleneck_is_768_channels_at_8_pixels(published: Adm) -> None:
    with torch.device("meta"):
        cond = Conditioning(label=torch.zeros(2, dtype=torch.int64))
        features = published(torch.zeros(2, 3, 64, 64), torch.zeros(2), cond, features_only=True)
        out = published(torch.zeros(2, 3, 64, 64), torch.zeros(2), cond)
    assert tuple(features.shape) == (2, 768, 8, 8)
    assert tuple(out.shape) == (2, 3, 64, 64)


def test_imagenet64_head_has_the_published_size() -> None:
    """8 -> 4 -> 1 pixels, 768 wide: two 4x4 convolutions and a 1x1, 18.9 M parameters."""
    with torch.device("meta"):
        head = make_family(recipes.get("edm-imagenet64").family).head()
    assert sum(p.numel() for p in head.parameters()) == pytest.approx(18.9e6, rel=2e-3)


def test_imagenet64_has_tens_of_disjoint_blocks(published: Adm) -> None:
    blocks = make_family(recipes.get("edm-imagenet64").family).blocks(published)
    owned = [id(p) for block in blocks for p in block.parameters()]
    assert 20 <= len(blocks) <= 60
    assert len(owned) == len(set(owned))


def test_features_stop_after_the_encoder(micro: Config) -> None:
    """The decoder may be anything, even nothing, when features are asked for."""
    network = Adm(adm(micro))
    x, cond = torch.randn(2, 1, 8, 8), Conditioning(label=torch.tensor([0, 1]))
    before = network(x, torch.zeros(2), cond, features_only=True)
    with torch.no_grad():
        for parameter in [*network.decoder.parameters(), *network.middle.parameters()]:
            parameter.fill_(float("nan"))
    torch.testing.assert_close(network(x, torch.zeros(2), cond, features_only=True), before)


def test_a_fresh_network_outputs_zero_so_its_denoiser_is_the_skip(micro: Config) -> None:
    network = Adm(adm(micro))
    out = network(torch.randn(2, 1, 8, 8), torch.zeros(2), Conditioning(label=torch.tensor([0, 1])))
    assert (out == out[:, :, :1, :1]).all()
    assert (out == 0).all()


def test_label_and_timestep_change_the_output(micro: Config) -> None:
    torch.manual_seed(0)
    network = Adm(adm(micro))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    x = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1)
    time, label = torch.tensor([0.0, 0.0, 0.5]), torch.tensor([0, 1, 0])
    a, b, c = network(x, time, Conditioning(label=label))
    assert not torch.allclose(a, b)
    assert not torch.allclose(a, c)


def test_sinusoid_is_cosines_then_sines_of_geometric_frequencies() -> None:
    time = torch.tensor([0.0, 1.0, -0.7])
    frequency = torch.tensor([1.0, 10_000 ** (-1 / 2)])
    phase = time[:, None] * frequency
    torch.testing.assert_close(sinusoid(time, 4), torch.cat([phase.cos(), phase.sin()], dim=1))


@pytest.mark.parametrize(("size", "ok"), [(4, True), (8, True), (32, True), (6, False), (2, False)])
def test_head_accepts_four_times_a_power_of_two_pixels_only(size: int, ok: bool) -> None:
    if not ok:
        with pytest.raises(Refused, match=f"not {size}"):
            ConvHead(8, size)
        return
    assert ConvHead(8, size)(torch.randn(3, 8, size, size)).shape == (3,)
