"""Whether a model was seen to blend rightly: a file that ``polarkv blend-check`` writes and engines want."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import msgspec

from polarkv_sglang.blend.select import Selection
from polarkv_sglang.errors import PolarError
from polarkv_sglang.identity import digest_config

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

# Raised whenever a pass changes so that what was checked before says nothing.
VERDICT_FORMAT = 1
_WEIGHTS: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_MOST_HEADER_BYTES: Final = 100_000_000  # the format's own limit
_SAMPLE_BYTES: Final = 4096  # of each tensor, from its middle


class UnknownWeights(PolarError):
    """Which weights a model has cannot be told from its files, so nothing is known of their check."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found; older files lack nothing that is asked of them."""

    model: str  # as it was named to the check
    passed: bool
    reasons: list[str]  # why not
    ratios: list[dict[str, float]]  # what was measured
    sglang: str
    format: int = VERDICT_FORMAT


def verdicts_folder(setting: str | None) -> Path:
    """Where verdicts are: ``setting`` (blend_verdicts), or polarkv/blend in the user's cache folder."""
    if setting is not None:
        return Path(setting)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "polarkv" / "blend"


def verdict_path(folder: Path, runner: ModelRunner, selection: Selection) -> Path:
    """The file of the runner's model: named by its configuration, weights, dtype and how rows are chosen.

    Whatever the ratio: a check tries several. Raises UnknownWeights.
    """
    config = digest_config(runner.model_config.hf_config.to_dict())
    weights = checkpoint_digest(_checkpoint(runner))
    checked = f"{config} {weights} {runner.dtype} {selection.settings()}"
    name = hashlib.sha256(checked.encode()).hexdigest()[:32]
    return folder / f"{name}.json"


def checkpoint_digest(folder: Path) -> str:
    """Tells checkpoints apart that share a configuration, from a part of each tensor; equal for copies.

    The same on every rank however weights are split over them, which a digest of those in memory is not.
    Files other than safetensors are read whole. Raises UnknownWeights for what cannot be read as weights.
    """
    whole = hashlib.sha256(b"polarkv-checkpoint\0")
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)
        for path in files:
            size = path.stat().st_size
            whole.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                if path.suffix == ".safetensors":
                    for part in _samples(file, size):
                        whole.update(part)
                else:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise UnknownWeights(f"the weights in {folder} cannot be read: {error}") from error
    if not files:
        raise UnknownWeights(f"there are no weights in {folder}")
    return whole.hexdigest()


def _samples(file: BinaryIO, file_bytes: int) -> Iterator[bytes]:
    """A safetensors file's header, and a part of each tensor. Raises ValueError if it is none."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(_MOST_HEADER_BYTES, file_bytes - 8):
        raise ValueError(f"{file.name} is no safetensors file, perhaps a pointer to one (Git LFS)")
    header = file.read(length)
    yield header
    for start, end in _tensors(header):
        size = min(_SAMPLE_BYTES, end - start)
        file.seek(8 + len(header) + (start + end - size) // 2)
        yield file.read(size)


class _Entry(msgspec.Struct):
    """What is wanted of a tensor's entry in a safetensors header; the metadata's has none of it."""

    data_offsets: tuple[int, int] = (0, 0)


def _tensors(header: bytes) -> list[tuple[int, int]]:
    """Where a safetensors file has its tensors, counted from the end of its header."""
    entries = msgspec.json.decode(header, type=dict[str, _Entry])
    return sorted(entry.data_offsets for entry in entries.values())


def _checkpoint(runner: ModelRunner) -> Path:
    """The folder that the runner's weights were read from. Raises UnknownWeights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    path = Path(runner.model_config.model_path)
    if path.is_dir():
        return path
    try:
        revision = runner.model_config.revision
        return Path(snapshot_download(str(path), revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise UnknownWeights(f"the weights of {path} are in no folder here") from error


def write_verdict(path: Path, verdict: Verdict) -> None:
    """Write it whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(msgspec.json.format(msgspec.json.encode(verdict)))
    scratch.replace(path)


def missing_verdict(path: Path) -> str | None:
    """Why the file at ``path`` does not let an engine blend; None if it does."""
    import sglang

    try:
        verdict = msgspec.json.decode(path.read_bytes(), type=Verdict)
    except FileNotFoundError:
        return f"the model was not checked ({path} is not there)"
    except (OSError, msgspec.MsgspecError) as error:
        return f"the verdict {path} cannot be read: {error}"
    if not verdict.passed:
        return f"the check failed: {'; '.join(verdict.reasons)}"
    if (verdict.sglang, verdict.format) != (sglang.__version__, VERDICT_FORMAT):
        return f"the model was checked with SGLang {verdict.sglang}, format {verdict.format}"
    return None
