"""Where data files are: found on this machine, or downloaded once with a checksum.

Places, in this order: ``$LILLIPUT_DATA/<folder>``, the cache ``$LILLIPUT_CACHE/<folder>`` (without
the variable ``~/.cache/lilliput``), Debian's ``/usr/share/datasets/<folder>``; then a download into
the cache. Files found locally may be recompressed copies, so they are checked by their content when
they are read, and only downloads by a checksum.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..core.optional import optional
from ..errors import DataNotFound

SYSTEM = Path("/usr/share/datasets")


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
