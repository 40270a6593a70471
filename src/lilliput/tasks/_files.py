"""Where data files are, found on this machine or downloaded once with a checksum, and how they are read.

Places, in this order: ``$LILLIPUT_DATA/<folder>``, the cache ``$LILLIPUT_CACHE/<folder>`` (without
the variable ``~/.cache/lilliput``), Debian's ``/usr/share/datasets/<folder>``; then a download into
the cache. Files found locally may be recompressed copies, so they are checked by their content when
they are read, and only downloads by a checksum. Whatever a reader says of a damaged file, the error is
the one of its :class:`Kind`, which names it.
"""

from __future__ import annotations

import csv
import gzip
import io
import lzma
import os
import struct
import tarfile
import wave
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..core.optional import optional
from ..errors import DataNotFound, InputError, LilliputError

SYSTEM = Path("/usr/share/datasets")
#: What the readers of gzip, xz, tar, zip, CSV, XML, sounds and pictures raise at a damaged file.
UNREADABLE = (
    OSError, EOFError, LookupError, RuntimeError, SyntaxError, ValueError, csv.Error, lzma.LZMAError,
    struct.error, tarfile.TarError, wave.Error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
#: Pillow's number, for pillow is imported only where there are pictures.
BILINEAR = 2


@dataclass(frozen=True)
class Remote:
    """A file that can be downloaded.

    Attributes:
        folder: the data set's folder below each place, for example ``"mnist"``.
        url: canonical address; its last part is the file's name.
        md5: checksum of the file at that address.
        alternative: what else brings the data set, a sentence for the error message.
    """

    folder: str
    url: str
    md5: str
    alternative: str = ""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


def cache_folder() -> Path:
    """Where downloads are kept: ``$LILLIPUT_CACHE``, else ``~/.cache/lilliput``."""
    chosen = os.environ.get("LILLIPUT_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lilliput"


def places(folder: str) -> list[Path]:
    """The folders in which the files of a data set are looked for, existing or not."""
    given = os.environ.get("LILLIPUT_DATA")
    roots = [Path(given).expanduser()] if given else []
    return [root / folder for root in (*roots, cache_folder(), SYSTEM)]


def find(folder: str, names: Iterable[str]) -> Path | None:
    """The first place's file or folder that has one of the names."""
    tried = (place / name for place in places(folder) for name in names)
    return next((path for path in tried if path.exists()), None)


def fetch(remote: Remote) -> Path:
    """The file, plain or as ``.gz``, from the first place that has it, downloaded if none has.

    Raises:
        DataNotFound: no place has it and the download failed; the message lists all of them.
        MissingDependency: no place has it and pooch, which downloads, is not installed.
    """
    found = find(remote.folder, dict.fromkeys([remote.name, remote.name.removesuffix(".gz")]))
    return found if found else download(remote)


def download(remote: Remote) -> Path:
    """Download into the cache and check the checksum.

    Raises:
        DataNotFound: the download failed, or what came has another checksum.
        MissingDependency: pooch is not installed.
    """
    purpose = f"downloading {remote.url} (not found in {_list(remote.folder)})"
    pooch = optional("pooch", "pooch", "data", purpose)
    folder = cache_folder() / remote.folder
    try:
        return Path(pooch.retrieve(remote.url, f"md5:{remote.md5}", remote.name, folder))
    except (OSError, ValueError) as error:
        raise _not_found(remote, error) from error


def not_found(folder: str, names: Iterable[str], advice: str) -> DataNotFound:
    """The error for files that cannot be downloaded."""
    wanted = " or ".join(names)
    return DataNotFound(f"no {wanted} in {_list(folder)}. {advice}")


@dataclass(frozen=True)
class Kind:
    """What a file should be, for the errors about one that is not.

    Attributes:
        name: for example ``"CIFAR-10"``.
        advice: what to do about a damaged file, a sentence.

    Example:
        >>> str(Kind("MNIST").damaged("d/label.gz", "it has 3 bytes"))
        'd/label.gz is not usable as MNIST: it has 3 bytes. Delete it and get it anew.'
    """

    name: str
    advice: str = "Delete it and get it anew."

    def damaged(self, place: object, why: str) -> InputError:
        """The error for a file, or for a file and what lies in it."""
        return InputError(f"{place} is not usable as {self.name}: {why}. {self.advice}")

    @contextmanager
    def readable(self, place: object) -> Iterator[None]:
        """Read a file inside: what its reader raises where it is damaged becomes the error that names it.

        Raises:
            InputError: the file is damaged.
        """
        try:
            yield
        except LilliputError:
            raise
        except UNREADABLE as error:
            why = f"it cannot be read ({str(error) or type(error).__name__})"
            raise self.damaged(place, why) from error

    @contextmanager
    def picture(self, source: Path | bytes, place: object) -> Iterator[Any]:
        """A picture as pillow opens it, to be used inside, for pillow decodes it only then.

        Args:
            source: the file, or what it holds.
            place: how errors call it.

        Raises:
            InputError: the picture is damaged.
            MissingDependency: pillow is not installed.
        """
        pillow = optional("PIL.Image", "pillow", "data", f"decoding {place}")
        with self.readable(place):
            try:
                stream = io.BytesIO(source) if isinstance(source, bytes) else source
                with pillow.open(stream) as image:
                    yield image
            except pillow.DecompressionBombError as error:  # only a damaged header is that large
                raise ValueError(str(error)) from error


def opened(path: Path) -> IO[bytes] | gzip.GzipFile:
    """The bytes of a file, or those that it holds where its name ends in ``.gz``."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def text(path: Path) -> str:
    """The text in such a file; lines end with a line feed alone."""
    with opened(path) as file:
        return file.read().decode().replace("\r\n", "\n")


@contextmanager
def archive(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar file, packed or not; leaving it reads what is left of it.

    For tarfile takes a damaged member for the end, and a packed file's checksum is compared at its end only.
    """
    with tarfile.open(path) as file:
        yield file
        while file.fileobj is not None and file.fileobj.read(1 << 20):
            pass


def _not_found(remote: Remote, error: Exception) -> DataNotFound:
    return DataNotFound(
        f"no {remote.name} in {_list(remote.folder)}; and the download from {remote.url} failed: "
        f"{type(error).__name__}: {error}. Either connect to the network and try again, or "
        f"download the file elsewhere (md5 {remote.md5}), put it into a folder D/{remote.folder} "
        f"and set LILLIPUT_DATA=D. {remote.alternative}".rstrip()
    )


def _list(folder: str) -> str:
    unset = "" if os.environ.get("LILLIPUT_DATA") else " (LILLIPUT_DATA is not set)"
    return ", ".join(str(place) for place in places(folder)) + unset
