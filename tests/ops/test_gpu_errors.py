"""What is told of errors that a kernel meets on the GPU: each test loses a process of its own."""

from scripts import run_script

# Rows of a cache that lie far behind its pages: the kernel writes where nothing is.
WRITE_ASTRAY = """
import os, time, torch
import moq
pages = torch.zeros(1, 2, 64, 32, dtype=torch.float16, device="cuda")
qkv = torch.zeros(3, 8 * 32, dtype=torch.float16, device="cuda")
rows = torch.zeros(3, dtype=torch.int32, device="cuda")
append = lambda rows: torch.ops.moq.append_kv(qkv, pages, pages.clone(), rows, num_heads=4)
append(rows)
torch.cuda.synchronize()
astray = rows + 2**30
values = pages.clone()
torch.cuda.synchronize()
try:
    for _ in range(2):
        torch.ops.moq.append_kv(qkv, pages, values, astray, num_heads=4)
        time.sleep(0.5)  # the second launch is told of the first one's error
except Exception as error:
    print(error, flush=True)
os._exit(0)
"""


def told(gpu, **environment):
    """What the process printed."""
    result = run_script(WRITE_ASTRAY, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


NAMED = (
    "CUDA: kernel append_kv_kernel<Float16, 2> must run as 3 thread blocks of 128 threads and "
    '0 bytes of dynamic shared memory on GPU 0, got "an illegal memory access was encountered"'
)


def test_a_kernel_is_named_where_launches_block(gpu):
    message = told(gpu, CUDA_LAUNCH_BLOCKING="1")
    assert NAMED in message
    assert "before it" not in message


def test_a_later_launch_says_that_an_earlier_kernel_may_have_met_the_error(gpu):
    expected = f"{NAMED}, which a kernel before it may have met: CUDA_LAUNCH_BLOCKING=1 tells which"
    assert expected in told(gpu, CUDA_LAUNCH_BLOCKING="0")
