"""The project's images, built by buildah from its Dockerfiles.

Three steps, each keyed by the digest of its inputs so that an unchanged one is never done again: a base system
(mmdebstrap, from the machine's own apt sources), the lock's dependencies on it, the project's code on top. Only the
last one changes with the code. buildah's store is a folder of the cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .. import build
from ..progress import step
from ..settings import CACHE, PROJECT

_STORE = CACHE / "images" / "buildah"
_CERTIFICATES = "/etc/ssl/certs"
_MERGED = "usr-is-merged"  # says that /usr is merged already, and so keeps out usrmerge with 50 MB of Perl
_MERGE_HOOK = "/usr/share/mmdebstrap/hooks/merged-usr"


@dataclass(frozen=True)
class Image:
    """One image of the project: where its Dockerfile is, which package it carries and what its base needs."""

    name: str
    folder: str
    package: str
    base_packages: tuple[str, ...]

    @property
    def repository(self) -> str:
        return f"localhost/{self.name}"


IMAGES = {
    "operator": Image("qlora-operator", "operator", "qlora-operator", ("python3", "ca-certificates", _MERGED)),
    # the C compiler is Triton's, the headers are its stubs'
    "trainer": Image(
        "qlora-trainer",
        "trainer-image",
        "qlora-trainer",
        ("python3", "ca-certificates", "gcc", "g++", "libc6-dev", "libpython3-dev"),
    ),
}


def buildah(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """buildah on the store of the cache; what it says goes to a log unless it fails.

    Each call has mounts of its own, and its own record of them: it leaves those of an image that lent files mounted.
    """
    with tempfile.TemporaryDirectory(prefix="qlora-buildah-", dir="/run") as records:
        command = ["unshare", "--mount", "--propagation", "private", "buildah", "--root", str(_STORE)]
        command += ["--runroot", records, "--storage-driver", "overlay", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=False)
    if done.returncode and options.get("check", True):
        raise RuntimeError(f"buildah {arguments[0]}: {(done.stdout + done.stderr).strip()[-4000:]}")
    return done


def _exists(reference: str) -> bool:
    return buildah("inspect", "--type", "image", reference, check=False).returncode == 0


def _digest(*parts: str | bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        total.update(len(content).to_bytes(8, "big") + content)
    return total.hexdigest()[:16]


def build_image(image: Image) -> tuple[str, str]:
    """Builds the image unless it exists; returns the references of its dependencies' image and its own.

    The tags are digests of all that went into them.
    """
    dependencies = _dependencies(image)
    reference = tagged(image, dependencies)
    if not _exists(reference):
        with step(f"building {reference}"):
            _bud(image, reference, f"DEPENDENCIES={dependencies}")
            _prune(image, {dependencies, reference})
    return dependencies, reference


def _prune(image: Image, kept: set[str]) -> None:
    """Drops the store's earlier builds of this image: dependencies that nothing uses are 6 GB."""
    listed = buildah("images", "--format", "{{.Name}}:{{.Tag}}").stdout.split()
    ours = (f"{image.repository}:", f"{image.repository}-dependencies:")
    for reference in (name for name in listed if name.startswith(ours) and name not in kept):
        buildah("rmi", reference, check=False)  # one that another build stands on stays until that is gone


def tagged(image: Image, dependencies: str) -> str:
    """The reference that the image has with the working tree's code on these dependencies."""
    sources = [file for part in ("api", image.folder) for file in _sources(PROJECT / part)]
    contents = [item for file in sources for item in (str(file.relative_to(PROJECT)), file.read_bytes())]
    return f"{image.repository}:{_digest(dependencies, *contents)}"


def _sources(folder: Path) -> Iterable[Path]:
    names = [folder / "pyproject.toml", folder / "Dockerfile"]
    files = [path for path in (folder / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return [path for path in (*names, *sorted(files)) if path.exists()]


def _dependencies(image: Image) -> str:
    """The image with what the lock says the package needs; the trainer's takes minutes and 6 GB."""
    export = ["export", "--quiet", "--frozen", "--no-dev", "--no-emit-workspace", "--no-header", "--package"]
    done = subprocess.run([_uv(), *export, image.package], cwd=PROJECT, check=True, capture_output=True, text=True)
    base = _base(image.base_packages)
    dockerfile = (PROJECT / image.folder / "Dockerfile").read_text()
    recipe = dockerfile.partition(" AS dependencies")[2].partition("\nFROM ")[0]
    reference = f"{image.repository}-dependencies:{_digest(base, recipe, done.stdout)}"
    if not _exists(reference):
        with step(f"building {reference}"):
            _bud(image, reference, f"BASE_IMAGE={base}", target="dependencies")
    return reference


def _bud(image: Image, reference: str, *build_arguments: str, target: str = "") -> None:
    base = _base(image.base_packages)
    arguments = [f"UV_IMAGE={_uv_image()}", f"BASE_IMAGE={base}", *build_arguments]
    for variable in ("UV_DEFAULT_INDEX", "UV_INDEX"):
        if variable in os.environ:
            arguments.append(f"{variable}={os.environ[variable]}")
    folder = PROJECT / image.folder
    buildah(
        "bud",
        *("--isolation", "chroot", "--network", "host", "--pull-never", "--format", "oci"),
        # our own digests say what is new; buildah's layer cache (--layers) takes no notice of what a mount holds
        "--layers=false",
        # the machine's own certificates: a base system doesn't know a company's authority
        *("--volume", f"{_CERTIFICATES}:{_CERTIFICATES}:ro"),
        *(word for argument in arguments for word in ("--build-arg", argument)),
        *("--ignorefile", folder / "Dockerfile.dockerignore", "--file", folder / "Dockerfile", "--tag", reference),
        *(("--target", target) if target else ()),
        PROJECT,
    )


@cache
def _uv() -> str:
    return str(build.venv(CACHE / "uv-for-images", "uv>=0.11,<1").with_name("uv"))


@cache
def _uv_image() -> str:
    """An image with nothing but uv, as the Dockerfiles expect it."""
    version = subprocess.run([_uv(), "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
    reference = f"localhost/uv:{version}"
    if not _exists(reference):
        _from_scratch(reference, {"uv": Path(_uv())})
    return reference


@cache
def _base(packages: tuple[str, ...]) -> str:
    """A minimal Debian with these packages, from the machine's own apt sources and without a trace of them."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    suite = release["VERSION_CODENAME"].strip('"')
    options = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale", "info")]
    options += ["--variant=essential", f"--include={','.join(packages)}"]
    if _MERGED in packages:
        options.append(f"--hook-dir={_MERGE_HOOK}")
    reference = f"localhost/qlora-base:{_digest(suite, *options)}"
    if not _exists(reference):
        with step(f"building {reference} ({' '.join(packages)})"), tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            archive = Path(scratch) / "base.tar"
            clean = '--customize-hook=rm -rf "$1"/etc/apt/sources.list* "$1"/var/lib/apt/lists "$1"/var/cache/apt'
            subprocess.run(
                ["mmdebstrap", "--quiet", *options, clean, suite, str(archive), *_apt_sources()],
                check=True,
                stdin=subprocess.DEVNULL,
            )
            _from_scratch(reference, {"base.tar": archive})
    return reference


def _apt_sources() -> list[str]:
    """The machine's files with the distribution's own packages; none: mmdebstrap's defaults."""
    names = ("sources.list", "sources.list.d/debian.sources", "sources.list.d/ubuntu.sources")
    files = [Path("/etc/apt") / name for name in names]
    return [str(file) for file in files if file.is_file() and file.stat().st_size]


def _from_scratch(reference: str, files: dict[str, Path]) -> None:
    """An image of these files; tar archives are unpacked into it."""
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        context = Path(scratch)
        for name, path in files.items():
            try:
                os.link(path, context / name)
            except OSError:  # on another file system
                shutil.copy2(path, context / name)
        (context / "Dockerfile").write_text("FROM scratch\n" + "".join(f"ADD {name} /\n" for name in files))
        buildah("bud", "--isolation", "chroot", "--format", "oci", "--tag", reference, context)
