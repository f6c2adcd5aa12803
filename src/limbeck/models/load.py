"""Models and tokenizers from folders, hub ids and GGUF files. Weights come from safetensors or GGUF alone."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from limbeck.errors import ModelError, did_you_mean
from limbeck.models.linear import fast_linears

PathLike = str | Path
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_model(
    path: PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model in eval mode.

    `path` is a folder with config.json and safetensors, a .gguf file or a folder that holds one (weights are
    dequantised to `dtype`; needs the extra `gguf`), or a hub id. A path that exists is never looked up elsewhere.
    Raises ModelError: no such folder, pickled weights only, a broken or incomplete file, no config.json.
    """
    source, options = locate(path)
    options["trust_remote_code"] = trust_remote_code
    if "gguf_file" in options:
        from transformers import GgufConfig

        # Packed linears compute slowly on a CPU and cannot be saved.
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
        _require_safetensors(source)
    with _one_line(f"{path}: expected a causal language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
        model, info = loaded
    _require_whole(path, info)
    return fast_linears(move(model, device)).eval()


def load_tokenizer(path: PathLike, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, GGUF file or hub id; it has an EOS token and a pad token and pads on the right.

    Where the folder names no pad token, the EOS token is used: limbeck masks by lengths, so the EOS is learnt still.
    Raises ModelError: no tokenizer there, or one without an EOS token.
    """
    source, options = locate(path, config="tokenizer_config.json or tokenizer.json")
    with _one_line(f"{path}: expected a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{path}: expected a tokenizer with an EOS token (it ends every completion), found none; "
            f'set "eos_token" in its tokenizer_config.json'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_sequence_classifier(
    path: PathLike, *, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one logit (a reward model), in float32 and eval mode, and its tokenizer, which has a
    pad token. Raises ModelError as `load_model` does, and for another kind of model or number of logits."""
    source, options = locate(path)
    if "gguf_file" in options:
        raise ModelError(f"{path}: expected a classifier's folder with safetensors, found a .gguf file")
    _require_safetensors(source)
    with _one_line(f"{path}: expected a sequence classifier"):
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model, info = loaded
    kind = next(iter(model.config.architectures or ()), "no architecture")
    if not kind.endswith("ForSequenceClassification") or model.config.num_labels != 1:
        raise ModelError(
            f"{path}: expected a sequence classifier with one logit, found {kind} with "
            f"{model.config.num_labels}; name the folder of a reward model (num_labels 1)"
        )
    _require_whole(path, info)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders read the logit before the first of them
    return move(model, device).eval(), tokenizer


def locate(path: PathLike, *, config: str = "config.json") -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is given for a path: a folder or hub id, and options (`gguf_file`, `local_files_only`)."""
    place = Path(path).expanduser()
    if place.is_file():
        if place.suffix != ".gguf":
            raise ModelError(
                f"{path}: expected a folder, a .gguf file or a hub id, found another file; name its folder"
            )
        return str(place.parent), {"gguf_file": _with_gguf(place), "local_files_only": True}
    if place.is_dir():
        if any((place / name).exists() for name in config.split(" or ")):
            return str(place), {"local_files_only": True}
        files = sorted(place.glob("*.gguf"))
        if len(files) == 1:
            return str(place), {"gguf_file": _with_gguf(files[0]), "local_files_only": True}
        if files:
            raise ModelError(f"{path}: expected one .gguf file, found {len(files)}; name one, such as {files[0]}")
        if (place / "adapter_config.json").exists():
            raise ModelError(
                f"{path}: expected a model, found a LoRA adapter; merge it into its base model and save that"
            )
        raise ModelError(
            f"{path}: expected {config} (or a .gguf file) in this folder, found neither; name a model's folder"
        )
    if _is_hub_id(path, place):
        return str(path), {}
    raise ModelError(f"{path}: expected a folder, a .gguf file or a hub id, found nothing there{_nearest_entry(place)}")


def _is_hub_id(path: PathLike, place: Path) -> bool:
    """A name such as `gpt2` or `org/name`; `org` that is a folder here makes it a local path that is misspelt."""
    text = str(path)
    if not _HUB_ID.fullmatch(text) or text.endswith(".gguf"):
        return False
    return place.parent == Path(".") or not place.parent.is_dir()


def move(model: PreTrainedModel, device: torch.device | str | None) -> PreTrainedModel:
    """`model` on a device (None: where it is)."""
    moved: Any = model if device is None else nn.Module.to(model, device)
    return moved


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` with its weights in `dtype`, in place: what `load_model(..., dtype=dtype)` gives. `model.to(dtype)` would
    round buffers too, the rotary frequencies among them, which `from_pretrained` keeps in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _nearest_entry(place: Path) -> str:
    parent = place.parent
    while not parent.is_dir():
        place, parent = parent, parent.parent
    return did_you_mean(place, (str(parent / entry.name) for entry in parent.iterdir())) or f"; look in {parent}"


def _with_gguf(file: Path) -> str:
    try:
        import gguf  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise ModelError(
            f"{file}: expected the package `gguf` to read it, found none; pip install limbeck[gguf]"
        ) from None
    return file.name


def _require_safetensors(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return
    pickles = [file.name for pattern in _PICKLES for file in sorted(folder.glob(pattern))]
    if pickles:
        raise ModelError(
            f"{source}: expected safetensors, found pickled weights only ({pickles[0]}), which may run any code when "
            f"read; where you trust them, load them with transformers and save_pretrained() to a new folder"
        )
    raise ModelError(f"{source}: expected model.safetensors, found no weights; copy the whole folder of the model")


def _require_whole(path: PathLike, info: dict[str, Any]) -> None:
    """transformers fills weights that are missing with random numbers and says so in a log line only."""
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(kind) or ())
        if names:
            raise ModelError(
                f"{path}: expected every weight of the configuration, found {len(names)} {kind.split('_')[0]} "
                f"(first: {names[0]}); config.json and the weights do not belong together, copy the folder again"
            )


@contextmanager
def _one_line(expected: str) -> Generator[None]:
    """Turns what transformers raises for a bad folder into a ModelError of one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except SafetensorError as error:
        raise ModelError(f"{expected}, found a broken safetensors file ({error}); copy or download it again") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ModelError(
                f"{expected}, found one that brings its own code; if you trust it, set trust_remote_code: true"
            ) from error
        raise ModelError(f"{expected}, found: {type(error).__name__}: {reason[:300]}") from error
