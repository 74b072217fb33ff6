import subprocess
import sys


def test_process_and_solvers_stand_below_the_ops():
    """float64 NumPy alone: neither the ops nor the modules over them are loaded, nor Triton."""
    code = (
        "import sys, diffkern.process, diffkern.solvers;"
        "print([m for m in sys.modules if m.startswith(('diffkern.ops', 'diffkern.nn', 'triton'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
