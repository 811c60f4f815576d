"""Compiles csrc/ while pip installs the package; pyproject.toml holds the rest. See effkernels/_build.py."""

import importlib.util
import pathlib
import shutil

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("_build", ROOT / "effkernels" / "_build.py")
_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_build)


class BuildPy(build_py):
    def run(self):
        super().run()
        torch = _build.find_torch()
        built = _build.build(torch) if torch else None
        if built is None:
            # torch comes with the same installation; only in a checkout will it find what is compiled here.
            reason = (
                _build.build_without_torch() if self.editable_mode else "the first `import effkernels` compiles them"
            )
            if reason:
                self.warn(f"the kernels: {reason}")
        else:
            for library, reason in built.missing.items():
                if reason:
                    self.warn(f"the {library} library: {reason}")
        if self.editable_mode:
            return
        package = pathlib.Path(self.build_lib, "effkernels")
        shutil.copytree(_build.CSRC, package / "csrc", dirs_exist_ok=True)
        shutil.rmtree(package / "lib", ignore_errors=True)
        if built and built.folder:
            shutil.copytree(built.folder, package / "lib" / built.folder.parent.name / built.folder.name)


class PlatformDistribution(Distribution):
    """Gives wheels the name of the platform and Python version that their libraries are for."""

    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": BuildPy}, distclass=PlatformDistribution)
