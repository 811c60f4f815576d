"""Output sizes and padding of a 2-d window."""


def resolve_padding(op: str, padding: int | str, size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Padding before the first row (or column), and the number of output rows.

    `padding` is a number of rows on both sides, "auto" (kernel_size // 2) or "same": TensorFlow's, ceil(size / stride)
    outputs, with the odd row of padding at the end.
    """
    if padding == "same":
        out = -(-size // stride)
        total = max((out - 1) * stride + kernel_size - size, 0)
        return total // 2, out
    if padding == "auto":
        padding = kernel_size // 2
    if isinstance(padding, bool) or not isinstance(padding, int):
        raise TypeError(f'{op}: padding must be an int, "auto" or "same", got {padding!r}')
    if padding < 0:
        raise ValueError(f"{op}: padding must not be negative, got {padding}")
    if size + 2 * padding < kernel_size:
        raise ValueError(f"{op}: kernel size {kernel_size} exceeds the padded input size {size + 2 * padding}")
    return padding, (size + 2 * padding - kernel_size) // stride + 1


def extra_padding(size: int, out: int, before: int, kernel_size: int, stride: int) -> int:
    """How many more rows of padding the end needs than the beginning."""
    return max((out - 1) * stride + kernel_size - size - 2 * before, 0)


def covered(size: int, out: int, before: int, kernel_size: int, stride: int) -> int:
    """How many of `size` rows lie under a window: the first ones."""
    return min(max((out - 1) * stride - before + kernel_size, 0), size)
