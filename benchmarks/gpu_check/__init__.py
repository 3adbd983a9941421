"""Everything that only a GPU can show, in ten minutes and without a second try: `scripts/gpu_check.sh` runs it.

`__main__` runs the stages one after the other, each in a process of its own with a time of its own. A stage is a module
with a function `run(report, place)`. It writes what it finds as soon as it finds it; what fails is a result, too. On a
CPU all stages run at toy sizes, so that this kit itself is tested (`tests/benchmarks/test_gpu_check.py`).
"""
