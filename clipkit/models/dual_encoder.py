"""`DualEncoder`: an image tower and a text tower that embed into one space, with all that is needed to use them."""

import functools
import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from PIL import Image
from torch import Tensor, nn

from clipkit.core import ClipkitError, Side, write_json
from clipkit.images import Preprocess, decode, to_rgb
from clipkit.models.layers import Layout, under

__all__ = ["BACKBONE", "MODEL_FILE", "DualEncoder", "Tokenizer", "in_blocks"]

MODEL_FILE = "clipkit.json"
BACKBONE = "backbone."  # what the names of a `DualEncoder`'s weights begin with, and its library's own do not
GRAIN = 2  # tokens; with 1 batches get so small that nothing is gained, with 8 a fifth is lost
CPU_IMAGES, CPU_TOKENS, GPU_TOKENS = 16, 128, 8192  # of a block; see `DualEncoder.image_block`
CPU_ASKED = 4  # images of a block where few are asked for, which one alone takes as long as
TEXTS = 4096  # that are put in order of their lengths together
TOKENIZER_PROBES = ("a photo of a cat.", "Ünïcode 漢字 42!", "two  spaces, UPPER case", "")

Tokenizer = Callable[[list[str]], Tensor]


def in_blocks(encode: Callable[[Tensor], Tensor], rows: Tensor, height: int) -> Tensor:
    """Encode rows in blocks of one height; the last one is filled up with copies of a row of it.

    Args:
        encode: takes ``[height, …]`` and gives a row for each.
        rows: ``[n, …]``, one at least.
        height: of the blocks.
    """
    encoded = []
    for block in rows.split(height):
        missing = height - len(block)
        filled = torch.cat([block, block[:1].expand(missing, *block.shape[1:])]) if missing else block
        encoded.append(encode(filled)[: len(block)])
    return torch.cat(encoded)


class DualEncoder(nn.Module, ABC):
    """Two towers, their tokenizer and preprocessing, and the logit scale and bias they were trained with.

    Args:
        backbone: the library's own module.
        tokenizer: texts to int64 tokens ``[n, context_length]``, padded and cut.
        preprocess: how images become pixels.
        context_length: in tokens.
        embed_dim: of the shared space.
        activation: the towers' nonlinearity by name, as the library calls it.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        backbone: Any,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        *,
        context_length: int,
        embed_dim: int,
        activation: str,
    ):
        super().__init__()
        # channels_last is what convolutions are fast in, on CPUs with bf16 and on GPUs; other tensors are untouched.
        self.backbone: Any = backbone.to(memory_format=torch.channels_last)
        self.tokenizer = tokenizer
        self.set_preprocess(preprocess)
        self.context_length = context_length
        self.embed_dim = embed_dim
        self.activation = activation
        self.locked: tuple[Side, ...] = ()

    def set_preprocess(self, preprocess: Preprocess) -> None:
        """Look at images another way from now on. It is part of the fingerprint."""
        self.preprocess = preprocess
        self.register_buffer("_mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(preprocess.std).view(1, 3, 1, 1), persistent=False)

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _text_features(self, tokens: Tensor) -> Tensor: ...

    @abstractmethod
    def _needed_lengths(self, tokens: Tensor) -> Tensor: ...

    @abstractmethod
    def layouts(self) -> dict[Side, Layout]:
        """Which of the backbone's parameters belong to which layer of which tower."""

    @abstractmethod
    def check_image_size(self, side: int) -> None:
        """Refuse a side of square training images that the image tower cannot see.

        Raises:
            ClipkitError: where it is no multiple of the patches' side, or positions cannot be interpolated.
        """

    @abstractmethod
    def set_patch_dropout(self, share: float | None) -> None:
        """Leave out that share of an image's patches in training (Li et al. 2023, "FLIP"); None: as the model says.

        Raises:
            ClipkitError: where the image tower has no patches to leave out, or is locked.
        """

    @abstractmethod
    def set_gradient_checkpointing(self, on: bool) -> None:
        """Compute activations again in the backward pass instead of keeping them (Chen et al. 2016).

        Raises:
            ClipkitError: for a tower that cannot.
        """

    @property
    @abstractmethod
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the factor on the cosine similarities."""

    @property
    @abstractmethod
    def logit_bias(self) -> nn.Parameter | None:
        """What is added to the scaled similarities, where the model was trained with a sigmoid loss."""

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the towers' weights; what the pixels are cast to."""
        return next(p.dtype for p in self.backbone.parameters() if p.ndim > 1)

    def _normalise(self, pixels: Tensor) -> Tensor:
        if pixels.dtype == torch.uint8:
            pixels = (pixels.float() / 255 - self._mean) / self._std
        return pixels.to(self.dtype, memory_format=torch.channels_last)

    def encode_image(self, pixels: Shaped[Tensor, "n 3 height width"]) -> Float[Tensor, "n dim"]:
        """Unit-norm float32 embeddings of uint8 pixels (or of floats that are normalised already).

        Positions are interpolated for images of another size than the model's own; see `check_image_size`.
        """
        return F.normalize(self._image_features(self._normalise(pixels)).float(), dim=-1)

    def encode_text(self, tokens: Int64[Tensor, "n context"]) -> Float[Tensor, "n dim"]:
        """Unit-norm float32 embeddings of tokens, as many as the context has or fewer; see `trim` and `shorten`."""
        return F.normalize(self._text_features(tokens).float(), dim=-1)

    def forward(
        self, pixels: Tensor, tokens: Tensor
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"], Float[Tensor, ""], Float[Tensor, ""] | None]:
        """Both embeddings, the factor ``exp(logit_scale)``, and the bias or None: what a loss needs.

        One call, so that DistributedDataParallel sees every parameter used.
        """
        bias = None if self.logit_bias is None else self.logit_bias.reshape(()).float()
        scale = self.logit_scale.reshape(()).float().exp()
        return self.encode_image(pixels), self.encode_text(tokens), scale, bias

    def image_block(self, batch_size: int) -> int:
        """How many images are encoded at once where each embedding is to be the same whichever others are beside it.

        A matrix product rounds by its height: an image alone would get another embedding than the same image in a
        batch. In blocks of one height, the last one filled up (see `in_blocks`), it gets one. On a CPU 16 images are
        about as fast each as any number is (a ViT-B/32 on two cores: 25.4 ms in bf16 and 51.7 in fp32; at best 25.1 and
        51.5, and 8 at once 26.3 and 57.7); a GPU is kept busy by whole batches only.

        Args:
            batch_size: at most so many.
        """
        return min(batch_size, CPU_IMAGES) if self.device.type == "cpu" else batch_size

    def text_block(self, length: int, batch_size: int) -> int:
        """As `image_block`, of texts of so many tokens: 128 tokens at once on a CPU, 8,192 on a GPU."""
        return max(1, min(batch_size, (CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS) // length))

    def tokenize(self, texts: Sequence[str]) -> Int64[Tensor, "n context"]:
        """Tokens of the texts, padded and cut to the context length."""
        return self.tokenizer(list(texts))

    def trim(self, tokens: Int64[Tensor, "n context"], multiple: int = 1) -> Int64[Tensor, "n kept"]:
        """Cut the columns that cannot change any embedding: the padding of the batch's longest text, mostly.

        Only where that is certain: under a causal mask what comes after the pooled token is not seen, and Hugging Face
        encoders mask their padding. All columns stay where the tower looks at its padding (SigLIP). Embeddings and
        gradients are those of the padded texts up to rounding, dropout within a text tower aside.

        Args:
            tokens: still on the CPU; on a GPU this waits for the device.
            multiple: keep a multiple of so many columns, so that compiled towers meet fewer shapes.
        """
        needed = int(self._needed_lengths(tokens).max()) if len(tokens) else 1
        return tokens[:, : -(-needed // multiple) * multiple]

    def shorten(self, tokens: Int64[Tensor, "n context"], length: int) -> Int64[Tensor, "n length"]:
        """The first `length` tokens; a longer text ends in its end-of-text token all the same (Li et al. 2023)."""
        short, end = tokens[:, :length].clone(), self._end_token()
        if end is not None:
            cut = (tokens == end).any(1) & ~(short == end).any(1)
            short[cut, -1] = end
        return short

    def _end_token(self) -> int | None:
        end = getattr(self.tokenizer, "eot_token_id", None)  # open_clip's BPE
        if end is None:
            tokenizer = self.tokenizer.tokenizer  # type: ignore[attr-defined]
            end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        return end

    def layer_depths(self) -> dict[str, tuple[Side | None, int]]:
        """For each parameter's name its tower and depth: 0 embeddings, 1 … L layers, L + 1 last norm and projection.

        The logit scale and bias are in no tower.
        """
        layouts = self.layouts()
        depths: dict[str, tuple[Side | None, int]] = {}
        for name, _ in self.backbone.named_parameters():
            depths[f"backbone.{name}"] = (None, 0)
            for side, layout in layouts.items():
                if under(name, layout.root):
                    depths[f"backbone.{name}"] = (side, layout.depth(name))
        return depths

    def lock(self, side: Side, unlocked_layers: int = 0) -> None:
        """Keep a tower as it is, except for its projection into the shared space (Zhai et al. 2022, "LiT").

        Its parameters no longer require gradients, so that autograd keeps no activations of it, and it stays in
        evaluation mode under `train`: no dropout, BatchNorm's statistics as they are. Zhai et al. have no projection on
        the locked side at all; one that a tower was pretrained with, or needs for another dimension, does learn.

        Args:
            side: which tower.
            unlocked_layers: how many of its last layers learn all the same, and the last norm with them.

        Raises:
            ClipkitError: where it has fewer layers.
        """
        layout = self.layouts()[side]
        if unlocked_layers > len(layout.layers):
            raise ClipkitError(
                f"towers.{side}.unlocked_layers={unlocked_layers}: the {side} tower has {len(layout.layers)} layers"
            )
        learning = layout.learning(unlocked_layers)
        for name, parameter in self.backbone.named_parameters():
            if under(name, layout.root) and not under(name, learning):
                parameter.requires_grad_(False)
        self.locked = (*self.locked, side)
        self.train(self.training)

    def train(self, mode: bool = True) -> "DualEncoder":
        """Training mode, or evaluation mode; of a locked tower only what learns goes into training mode."""
        super().train(mode)
        if mode and self.locked:
            layouts = self.layouts()
            roots = [root for side in self.locked for root in layouts[side].root]
            modules = [module for name, module in self.backbone.named_modules() if under(name, roots)]
            for module in modules:
                module.training = False
            for module in modules:
                parameters = list(module.parameters())
                if parameters and all(p.requires_grad for p in parameters):
                    module.train()
        return self

    def load_image(self, image: Image.Image | bytes | str | Path) -> np.ndarray:
        """Pixels of one image, uint8 ``[3, height, width]``.

        Raises:
            BadSample: where it cannot be decoded.
        """
        background = self.preprocess.background
        if isinstance(image, Image.Image):
            return self.preprocess(to_rgb(image, background))
        return self.preprocess(decode(Path(image) if isinstance(image, str) else image, background))

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image | bytes | str | Path], batch_size: int = 64) -> np.ndarray:
        """Embeddings of images (paths, bytes or Pillow images), float32 ``[n, dim]``, unit norm.

        For a large set use `clipkit.embedding.embed`, which decodes in parallel and keeps what it has done.
        """
        rows = [np.zeros((0, self.embed_dim), np.float32)]
        block = min(batch_size, CPU_ASKED) if self.device.type == "cpu" else batch_size
        for start in range(0, len(images), block):
            pixels = np.stack([self.load_image(image) for image in images[start : start + block]])
            vectors = in_blocks(self.encode_image, torch.from_numpy(pixels).to(self.device), block)
            rows.append(vectors.cpu().numpy())
        return np.concatenate(rows)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """Embeddings of texts, float32 ``[n, dim]``, unit norm.

        Texts of like length are encoded together, each at no more than `GRAIN` - 1 tokens beyond what it needs: prompts
        and captions have 8 to 24 tokens, and contexts 77. They go in blocks whose height is decided by their length
        alone (see `text_block`), so a text's embedding is the same whichever others there are.

        Args:
            texts: any number.
            batch_size: at most so many at a time.
        """
        vectors = np.empty((len(texts), self.embed_dim), np.float32)
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        # Tokens of many at a time, so that few blocks have to be filled up, and not of all: they are 600 bytes a text.
        for start in range(0, len(texts), TEXTS):
            chosen = order[start : start + TEXTS]
            tokens = self.tokenize([texts[at] for at in chosen])
            kept = -(-self._needed_lengths(tokens) // GRAIN) * GRAIN
            for length in kept.unique().tolist():
                among, block = kept == length, self.text_block(length, batch_size)
                rows = tokens[among, :length].to(self.device)
                vectors[np.array(chosen)[among.numpy()]] = in_blocks(self.encode_text, rows, block).cpu().numpy()
        return vectors

    @functools.cached_property
    def tokenizer_state(self) -> str:
        """What decides how texts become tokens, as a canonical string; see also `TOKENIZER_PROBES`.

        Kept, as sorting a vocabulary halts every other thread for a fifth of a second.
        """
        vocabulary = getattr(self.tokenizer, "encoder", None)  # open_clip's BPE
        if vocabulary is None:
            vocabulary = self.tokenizer.tokenizer.get_vocab()  # type: ignore[attr-defined]
        probes = self.tokenize(TOKENIZER_PROBES).tolist()
        return json.dumps([sorted(vocabulary.items()), probes], ensure_ascii=False)

    def fingerprint(self, weights: Mapping[str, Tensor] | None = None) -> str:
        """32 hex digits over the weights' values, the tokenizer and the preprocessing.

        The values, not the files: saving the model again, moving it or storing it in another order changes nothing.
        A second of work per two gigabytes of weights.

        Args:
            weights: as in `save`.
        """
        hasher = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self._weights(weights).items()):
            if name.endswith("num_batches_tracked"):  # of BatchNorm in training; no output depends on it
                continue
            hasher.update(f"{name}{list(tensor.shape)}".encode())
            values: Any = tensor.to("cpu", torch.float32).contiguous().numpy()  # numpy's stubs know no buffers
            hasher.update(values)
        facts = [self.preprocess.model_dump(mode="json"), self.context_length, self.activation]
        hasher.update(json.dumps(facts, sort_keys=True).encode())
        hasher.update(self.tokenizer_state.encode("utf-8", "surrogatepass"))
        return hasher.hexdigest()

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write everything that is needed to use the model offline: weights, tokenizer, preprocessing, settings.

        The folder is also an ordinary model folder of the library that the towers come from.

        Args:
            folder: is made.
            weights: written instead of the model's own, by the names and with the shapes of its `state_dict` (such as
                ``backbone.logit_scale``), all of them. The model's own tensors are not looked at then, so another
                thread may train it meanwhile.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self._weights(weights)
        self._save_backbone(folder, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        facts = {
            "fingerprint": self.fingerprint(weights),
            "embed_dim": self.embed_dim,
            "context_length": self.context_length,
            "activation": self.activation,
            "logit_scale": float(tensors["logit_scale"].float().exp()),
            "logit_bias": float(tensors["logit_bias"]) if "logit_bias" in tensors else None,
            "preprocess": self.preprocess.model_dump(mode="json"),
        }
        write_json(folder / MODEL_FILE, facts)
        # safetensors lets nobody but the owner read what it writes, and a model is for those who embed with it, too.
        shutil.copymode(folder / MODEL_FILE, folder / "model.safetensors")

    def _weights(self, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """What is to be saved, by the backbone's names."""
        if weights is None:
            return {name: tensor.detach() for name, tensor in self.backbone.state_dict().items()}
        return {name.removeprefix(BACKBONE): tensor.detach() for name, tensor in weights.items()}

    @abstractmethod
    def _save_backbone(self, folder: Path, weights: dict[str, Tensor]) -> None: ...
