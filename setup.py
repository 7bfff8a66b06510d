"""Maps the repository's rooms to packages; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["vitup_fast", "vitup_fast.ops", "vitup_fast.kernels", "vitup_fast.bench"],
    package_dir={"vitup_fast.kernels": "kernels", "vitup_fast.bench": "bench"},
    package_data={
        "vitup_fast": ["py.typed"],
        "vitup_fast.kernels": ["configs/*.json"],
        "vitup_fast.bench": ["run_gpu.sh", "compile_report.json"],
    },
)
