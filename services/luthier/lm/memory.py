"""How much memory there is for this process, how much it holds, and what the C library does with what it frees."""

import ctypes
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_DEFAULT_BYTES = 128 * 1024
_LARGEST_TRIM_BYTES = 2**31 - 1
# The largest that glibc takes; activations of one operator are smaller.
_LARGEST_MMAP_BYTES = 2**25
# From Linux's mman.h.
_MADV_DONTNEED = 4


@contextmanager
def freed_memory_kept(largest_bytes: int = _LARGEST_MMAP_BYTES) -> Iterator[None]:
    """Keep freed memory in the process during the block, and give it back to the system after it.

    A step's activations are given back by default, and every page of the next step's is then made and zeroed anew:
    3 to 4 % of a step on two cores. Blocks larger than `largest_bytes` go back at once all the same. Without glibc the
    block runs as it is.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_M_TRIM_THRESHOLD, _LARGEST_TRIM_BYTES)
    library.mallopt(_M_MMAP_THRESHOLD, min(largest_bytes, _LARGEST_MMAP_BYTES))
    try:
        yield
    finally:
        library.mallopt(_M_TRIM_THRESHOLD, _DEFAULT_BYTES)
        library.mallopt(_M_MMAP_THRESHOLD, _DEFAULT_BYTES)
        library.malloc_trim(0)


def limit_bytes(device: torch.device, available: int | None, sharing: int = 1) -> int:
    """Most memory that this process may hold on a device, what it holds already counted; 0: nobody says.

    On a processor `available` is left, None: that is not known. It is one of `sharing` processes that take what is free
    in equal parts.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free // sharing + torch.cuda.memory_reserved(device))
    return 0 if available is None else resident_bytes() + max(0, available) // sharing


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not say."""
    return _of_status("VmRSS")


def watch_peak(device: torch.device) -> None:
    """Let `peak_bytes` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        # The peak of the whole process then counts, which is no less.
        return


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held on a device since `watch_peak`; 0 where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return _of_status("VmHWM")


def give_back(device: torch.device) -> None:
    """Give memory that is free, and that this process keeps for itself, back to the system, where it can."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


class FilePages:
    """The files of weights that are mapped into this process now, whose pages can go before the mappings do."""

    def __init__(self) -> None:
        try:
            lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        ranges = [line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(".safetensors")]
        self._ranges = [(int(first, 16), int(end, 16)) for first, end in ranges]

    def give_back(self, tensor: torch.Tensor) -> None:
        """Give back the pages that a tensor alone is mapped from; where it is not, nothing.

        Who reads it again reads the file again.
        """
        first, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if not any(start <= first and first + size <= end for start, end in self._ranges):
            return
        page = mmap.PAGESIZE
        whole, end = -(-first // page) * page, (first + size) // page * page
        if end > whole:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(whole), ctypes.c_size_t(end - whole), _MADV_DONTNEED)


def _of_status(name: str) -> int:
    return _kilobytes(Path("/proc/self/status"), name)


def _kilobytes(path: Path, name: str) -> int:
    """Return in bytes what a file of the kernel says of a name; 0 where it says nothing."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", path.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found is not None else 0
