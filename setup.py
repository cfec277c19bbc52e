"""What pyproject.toml cannot say: in a wheel `tools/` and `configs/` are parts of mmdet_ext."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# They measure against benchmarks/, or the phantom itself.
OF_THE_REPOSITORY = {"benchmark", "mask_ceiling", "mask_quality", "observe_phantom"}


class Build(build_py):
    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if package != "mmdet_ext.tools" or m[1] not in OF_THE_REPOSITORY]


setup(
    packages=[
        *find_packages(include=["ct_volumes*", "deeplesion*", "mmdet_ext*"]),
        "mmdet_ext.configs",
        "mmdet_ext.tools",
    ],
    package_dir={"mmdet_ext.configs": "configs", "mmdet_ext.tools": "tools"},
    package_data={
        "ct_volumes": ["page.html", "page.js"],
        "deeplesion.report": ["page.css", "report.html", "study.html"],
        "mmdet_ext.configs": ["*/*.py"],
        "mmdet_ext.engine": ["references/*.json"],
    },
    cmdclass={"build_py": Build},
)
