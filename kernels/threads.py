"""How many CPU threads the kernels share their loops between."""

from __future__ import annotations

import torch

from inferfleet.kernels import build

#: Elements below which waking a second thread costs more than the work.
MIN_PARALLEL_ELEMENTS = 32768

_count: int | None = None


def use(count: int) -> None:
    """Let the kernels of this process use so many threads, and torch's own operators one.

    What torch still does in a step is small, and its OpenMP teams wait for their last thread: on a machine whose
    cores others want as well, each such wait is a time slice. See `lend_to_torch` for where torch does more.
    """
    global _count
    if count < 1:
        raise ValueError(f"threads must be at least 1, not {count}")
    _count = count
    torch.set_num_threads(1 if build.library() is not None else count)


def lend_to_torch() -> None:
    """Called where a matrix product is torch's after all (no compiler, float16, another CPU): it gets all threads."""
    torch.set_num_threads(for_work())


def for_work() -> int:
    """Threads for a kernel with much to do: what `use` said, else as many as torch uses."""
    return torch.get_num_threads() if _count is None else _count


def for_elements(elements: int) -> int:
    """Threads for an elementwise kernel over so many elements."""
    return for_work() if elements >= MIN_PARALLEL_ELEMENTS else 1
