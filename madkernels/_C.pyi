from typing import TypedDict

SCAN_CHUNK: int  # steps between the checkpoints of a selective scan
MATRIX_CHUNK: int  # likewise of a scan of matrix states

class FftPlanGpu(TypedDict):  # of the stub alone: a dict at run time
    classes: list[tuple[int, int, int]]
    on_chip: int
    channels: int
    copies_to_time: bool
    slices: int
    chunk: int
    work_points: int
    more_work_points: int

def build_info() -> dict[str, str]: ...
def cpu_bfloat16_dot() -> bool: ...
def cpu_isa() -> str: ...
def cpu_supported() -> list[str]: ...
def exp2_rate(threads: int) -> float: ...
def fft_conv_plan(length: int, filter_len: int, history: int = 0) -> dict[str, int]: ...
def fft_conv_plan_gpu(
    seqlen: int,
    filter_len: int,
    *,
    dim: int = 1,
    sequences: int = 1,
    packed: bool = False,
    history: int = 0,
    causal: bool = True,
    time_contiguous: bool = False,
    backward: bool = False,
    element_bytes: int = 4,
    multiprocessors: int = 132,
    shared_bytes: int = 232448,
) -> FftPlanGpu: ...
def multiply_rate(dtype: str, threads: int) -> float: ...
def selective_scan_split(
    batch: int, seqlen: int, dim: int, groups: int = 1, multiprocessors: int = 132
) -> dict[str, int]: ...
