"""The workloads of the benchmarks: models and layers at the sizes that people run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from effens_kernels.testing import IndexedCase, LinearCase, MixCase, MixtureCase, RaggedCase, strided


@dataclass(frozen=True)
class ForumWorkload:
    """The forum question's models: `heads` output layers of `actions` on MLPs of three hidden layers.

    Ensemble2 has a trunk per member; Ensemble1 one trunk for all members, and heads per member.
    """

    members: int
    heads: int
    batch: int
    state: int
    hidden: int
    actions: int
    shared_trunk: bool = False

    def __str__(self) -> str:
        model = "Ensemble1" if self.shared_trunk else "Ensemble2"
        return (
            f"{model}-E{self.members}-H{self.heads}-B{self.batch}-{self.state}-{self.hidden}-{self.hidden}-"
            f"{self.hidden}-{self.actions}"
        )

    def layers(self) -> list[tuple[int, int]]:
        """(I, O) of each product, the heads as one."""
        widths = [self.state, self.hidden, self.hidden, self.hidden, self.heads * self.actions]
        return list(zip(widths, widths[1:]))


FORUM_WORKLOADS = tuple(
    ForumWorkload(*sizes, shared_trunk=shared)
    for sizes in ((10, 5, 256, 8, 64, 4), (5, 10, 128, 17, 256, 6))
    for shared in (False, True)
)

LAYER_WORKLOADS = (
    LinearCase(4, 128, 64, 64),
    LinearCase(32, 128, 64, 64),
    LinearCase(10, 256, 256, 256),
    LinearCase(32, 1024, 128, 128),
    LinearCase(5, 128, 784, 128, shared=True, activation="relu"),
    LinearCase(8, 512, 512, 512, activation="relu"),
    LinearCase(4, 1024, 1024, 1024),
)

# Levels of a tree of sampled paths, from its root downwards, and a layer that routes inputs to few of many members.
INDEXED_WORKLOADS = (
    IndexedCase(4, 128, 64, 64, sources=4, groups=16, activation="relu"),
    IndexedCase(4, 128, 256, 256, sources=16, groups=32, activation="relu"),
    IndexedCase(5, 128, 784, 128, sources=1, groups=5, activation="relu"),
    IndexedCase(4, 512, 512, 512, sources=4, groups=12),
    IndexedCase(32, 64, 256, 256, sources=8, groups=16),
)

RAGGED_WORKLOADS = (
    RaggedCase(8, 1024, 64, 64),
    RaggedCase(10, 2560, 256, 256, activation="relu"),
    RaggedCase(64, 2048, 128, 128),
    RaggedCase(8, 4096, 512, 512, activation="relu"),
)


@dataclass(frozen=True)
class BatchEnsembleWorkload:
    """A BatchEnsemble MLP of these widths on data that all members see, or, with one layer, an inner layer of one."""

    members: int
    batch: int
    widths: tuple[int, ...]
    model: bool = True

    def __str__(self) -> str:
        kind = "MLP" if self.model else "layer"
        return f"{kind}-E{self.members}-B{self.batch}-{'-'.join(map(str, self.widths))}"

    def inputs_for(
        self, dtype: torch.dtype, device: torch.device | str, seed: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """Random x and, for each layer, (weight, r, s, bias)."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return strided(shape, "contiguous", generator, dtype, device)

        rows = (self.batch, self.widths[0]) if self.model else (self.members, self.batch, self.widths[0])
        layers = []
        for inputs, outputs in zip(self.widths, self.widths[1:]):
            weight = normal(outputs, inputs) * inputs**-0.5
            r, s = (1 + 0.3 * normal(self.members, size) for size in (inputs, outputs))
            layers.append((weight, r, s, 0.1 * normal(self.members, outputs)))
        return normal(*rows), layers


BATCHENSEMBLE_WORKLOADS = (
    BatchEnsembleWorkload(5, 128, (3072, 128, 128, 10)),
    BatchEnsembleWorkload(32, 256, (64, 256, 256, 256, 10)),
    BatchEnsembleWorkload(5, 128, (128, 128), model=False),
    BatchEnsembleWorkload(32, 256, (256, 256), model=False),
    BatchEnsembleWorkload(16, 256, (512, 512), model=False),
)


@dataclass(frozen=True)
class ConvWorkload:
    """A BatchEnsemble convolution of images of size x size; padding keeps their size at a stride of 1."""

    members: int
    batch: int
    inputs: int
    outputs: int
    size: int
    kernel: int = 3
    stride: int = 1
    shared: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        name = f"E{self.members}-B{self.batch}-C{self.inputs}-O{self.outputs}-{self.size}x{self.size}-k{self.kernel}"
        name += f"-s{self.stride}" * (self.stride > 1) + "-shared" * self.shared
        return name + "-channels_last" * self.channels_last

    def inputs_for(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple[Tensor, ...]:
        """Random (x, weight, r, s, bias)."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return strided(shape, "contiguous", generator, dtype, device)

        x, weight = self._images(normal), self._weights(normal)
        r, s = (1 + 0.3 * normal(self.members, channels) for channels in (self.inputs, self.outputs))
        return x, weight, r, s, 0.1 * normal(self.members, self.outputs)

    def _images(self, normal: Callable[..., Tensor]) -> Tensor:
        members = 1 if self.shared else self.members
        x = self._laid_out(normal(members * self.batch, self.inputs, self.size, self.size))
        return x if self.shared else x.unflatten(0, (self.members, self.batch))

    def _weights(self, normal: Callable[..., Tensor], count: int = 1) -> Tensor:
        """Below each other, as one weight of `count` times the output channels."""
        weights = normal(count * self.outputs, self.inputs, self.kernel, self.kernel)
        return self._laid_out(weights * (self.inputs * self.kernel**2) ** -0.5)

    def _laid_out(self, t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if self.channels_last else t


@dataclass(frozen=True)
class MixtureConvWorkload(ConvWorkload):
    """The same of weights that are mixed of templates."""

    templates: int = 4

    def __str__(self) -> str:
        return f"{super().__str__()}-T{self.templates}"

    def inputs_for(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> tuple[Tensor, ...]:
        """Random (x, coefficients, templates, bias)."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return strided(shape, "contiguous", generator, dtype, device)

        templates = self._weights(normal, self.templates).unflatten(0, (self.templates, self.outputs))
        coefficients = normal(self.members, self.templates) * self.templates**-0.5
        return self._images(normal), coefficients, templates, 0.1 * normal(self.members, self.outputs)


CONV_WORKLOADS = (
    ConvWorkload(4, 32, 3, 64, 32, shared=True),
    ConvWorkload(4, 32, 64, 64, 32),
    ConvWorkload(4, 32, 128, 128, 16),
)

# As in wide residual networks for images of 32 x 32.
MIXTURE_CONV_WORKLOADS = (
    MixtureConvWorkload(4, 32, 16, 16, 32, templates=4),
    MixtureConvWorkload(4, 16, 64, 64, 16, templates=5),
    MixtureConvWorkload(4, 8, 160, 160, 16, templates=5),
    MixtureConvWorkload(4, 8, 320, 320, 8, templates=5),
)

MIX_WORKLOADS = (
    MixCase((4,), 4, (320, 320, 3, 3)),
    MixCase((4,), 5, (640, 640, 3, 3)),  # WRN-28-10's largest
    MixCase((8,), 16, (256, 256, 3, 3)),
    MixCase((10,), 8, (512, 512)),
    MixCase((32,), 16, (256, 256)),
)

MIXTURE_WORKLOADS = (
    MixtureCase(5, 128, 784, 128, shared=True, templates=3),
    MixtureCase(4, 128, 256, 256, templates=4),
    MixtureCase(8, 128, 512, 512, templates=4),
    MixtureCase(32, 8, 256, 256, templates=8),
    MixtureCase(32, 16, 512, 512, shared=True, templates=4),
)


@dataclass(frozen=True)
class PredictWorkload:
    """Logits of an ensemble of classifiers."""

    members: int
    batch: int
    classes: int

    def __str__(self) -> str:
        return f"E{self.members}-B{self.batch}-C{self.classes}"

    def inputs_for(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> Tensor:
        """Random logits of members that agree in part."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.classes)
        common = strided(shape, "contiguous", generator, torch.float32, device)
        return (2 * common + strided((self.members, *shape), "contiguous", generator, torch.float32, device)).to(dtype)


PREDICT_WORKLOADS = (
    PredictWorkload(5, 1024, 10),
    PredictWorkload(32, 4096, 10),
    PredictWorkload(10, 1024, 100),
    PredictWorkload(4, 256, 1000),
    PredictWorkload(32, 64, 1000),
)
