r"""Estimate the GPU memory of a training run before any weight is downloaded.

    python tools/estimate_memory.py --config lora-sks-dog/training_config.yaml
    python tools/estimate_memory.py --budget 8 --instance_data_dir dog --mixed_precision bf16 \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --instance_prompt "a photo of sks dog" --train_batch_size 1

All flags but --budget are those of train_dreambooth_lora_sdxl.py. Every phase of the run is executed on the meta
device, where tensors have shapes but no values, and all storages are counted. A GPU's context and the workspaces of
libraries, about half a GB together, come on top.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import logging
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

import train_dreambooth_lora_sdxl as trainer
from train_dreambooth_lora_sdxl import GB, Run, UserError

ATEN = torch.ops.aten
FLOPS = {**flop_registry,  # the CPU's attention keeps for the backward pass what flash attention keeps
         ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATEN._scaled_dot_product_flash_attention],
         ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
             flop_registry[ATEN._scaled_dot_product_flash_attention_backward]}
CARDS = (4, 6, 8, 10, 12, 16, 24, 32, 48, 80)  # GB as sold, 2**30 bytes each: the difference is for the context
EIGHTHS = 8  # of the blocks that are checkpointed; each estimate takes seconds
CURES = {"training": "a smaller --resolution or --train_batch_size", "validation": "a smaller validation picture",
         "decoding": "a smaller validation picture, or a VAE that does not need float32,"}


class MemoryMeter(TorchDispatchMode):
    """Counts what runs within it: bytes of living tensors on a device and their peak, operators, launches, FLOPs.

    A launch is an operator that is neither a view nor a query.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.shapes: dict[Any, Any] = {}
        self.bytes = self.peak = self.weights = self.trained = self.operators = self.launches = self.flops = 0
        self.living = set()

    def begin(self) -> None:
        """Count from here; what lives now are the weights."""
        self.peak = self.weights = self.bytes
        self.operators = self.launches = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_known = self.device == "meta" and not func.is_view and not func._schema.is_mutable
        result = self.by_shape(func, args, kwargs or {}) if is_known else func(*args, **(kwargs or {}))
        called = "prim" not in func.namespace
        self.operators += called
        self.launches += called and not func.is_view
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self.count(tensor.untyped_storage())
        return result

    def by_shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operator makes on the meta device; arguments of the same shapes are worked out once."""
        leaves, structure = tree_flatten((args, kwargs))
        key = (func, structure, *(shape_of(leaf) for leaf in leaves))
        if key not in self.shapes:
            result = func(*args, **kwargs)
            made, structure = tree_flatten(result)
            given = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
            is_new = all(leaf is None or leaf.untyped_storage()._cdata not in given for leaf in made)
            self.shapes[key] = ([None if leaf is None else shape_of(leaf) for leaf in made], structure, is_new)
            return result
        shapes, structure, is_new = self.shapes[key]
        if not is_new:  # a view by another name
            return func(*args, **kwargs)
        made = [shape and torch.empty_strided(*shape[:2], dtype=shape[2], device="meta") for shape in shapes]
        return tree_unflatten(made, structure)

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it dies."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.living:
            self.living.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        """Stop counting a storage that died."""
        self.living.discard(key)
        self.bytes -= size


def shape_of(leaf: Any) -> Any:
    """Return what of an operator's argument decides the shapes of its results."""
    return (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Use attention that keeps no products of queries and keys, as GPUs do; the meta device has none by itself."""
    usual = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = \
        lambda query, key, value, *_, **__: ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = usual


def give_storage(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace a model's tensors by ones on the current device: adapters in float32, the rest in dtype."""
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=torch.float32 if old.requires_grad else dtype)
                module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        for name, old in module._buffers.items():
            module._buffers[name] = old if old is None else torch.zeros(old.shape, dtype=old.dtype)
    return model


class MemoryEstimator:
    """The phases of a run on the meta device, a method each: weights, activations, gradients and optimizer states."""

    def __init__(self, run: Run) -> None:
        self.run, self.args, self.meter = run, run.args, MemoryMeter("meta")
        self.encoders = [trainer.meta_model(run.base, part) for part in trainer.TEXT_ENCODERS]
        self.resolution, self.side = run.args.resolution, run.args.resolution // run.vae_factor
        largest = max(run.prompts, key=lambda prompt: prompt.height * prompt.width, default=None)
        height, width = (largest.height, largest.width) if largest else (self.resolution, self.resolution)
        self.drawn = height // run.vae_factor, width // run.vae_factor
        self.objective = trainer.make_objective(run.args, run.scheduler, torch.device("meta"))

    @functools.cached_property
    def unet(self) -> nn.Module:
        """The UNet, made for the phases that need one."""
        return trainer.meta_model(self.run.base, "unet")

    def text(self, rows: int, dtype: torch.dtype) -> trainer.Text:
        """Rows of embeddings."""
        first, second = (encoder.config for encoder in self.encoders)
        shape = rows, first.max_position_embeddings, self.unet.config.cross_attention_dim
        return torch.empty(shape, dtype=dtype), torch.empty(rows, second.projection_dim, dtype=dtype)

    def packed_unet(self, dtype: torch.dtype) -> nn.Module:
        """The UNet as it lies on the device; unpacked it was on the host only."""
        give_storage(self.unet, dtype)
        if self.args.base_precision != "auto":
            trainer.pack_unet(self.unet, self.args.base_precision, torch.device("meta"))
        self.meter.begin()
        return self.unet

    def prompts(self) -> None:
        """Encode one prompt with the larger encoder."""
        encoder = give_storage(self.encoders[1], self.run.dtype)
        self.meter.begin()
        encoder(torch.zeros(1, encoder.config.max_position_embeddings, dtype=torch.long), output_hidden_states=True)

    def vae(self, dtype: torch.dtype) -> nn.Module:
        """The VAE in the dtype that it needs."""
        vae = trainer.meta_model(self.run.vae, "vae")
        give_storage(vae, trainer.vae_dtype(vae.config, dtype))
        self.meter.begin()
        return vae

    def pictures(self) -> None:
        """Encode one picture."""
        vae = self.vae(torch.float32)
        vae.encode(torch.empty(1, 3, self.resolution, self.resolution, dtype=vae.dtype))

    def decoding(self) -> None:
        """Decode one picture; in a validation the UNet is there, unless it is offloaded."""
        if self.run.prompts and not trainer.checkpointed(self.args):
            self.packed_unet(self.run.dtype)
        vae = self.vae(self.run.dtype)
        vae.decode(torch.empty(1, 4, *self.drawn, dtype=vae.dtype))

    def drawing(self, rows: int, dtype: torch.dtype, size: tuple[int, int]) -> None:
        """One denoising step of `rows` pictures with guidance."""
        unet, (embeds, pooled) = self.packed_unet(dtype), self.text(2 * rows, dtype)
        added = {"text_embeds": pooled, "time_ids": torch.empty(2 * rows, 6)}
        latents = torch.empty(2 * rows, 4, *size, dtype=dtype)
        unet(latents, torch.tensor(1), embeds, added_cond_kwargs=added)

    @torch.enable_grad()
    def training(self) -> None:
        """One optimizer step, the optimizer's moments included."""
        args, trained = self.args, self.encoders if self.run.text.is_trained else []
        trainer.add_adapters(args, self.unet)
        self.run.text.add_to(self.run, trained)
        for encoder in trained:
            give_storage(encoder, self.run.dtype)
        unet = self.packed_unet(self.run.dtype)
        trainer.use_checkpointing(args, unet, trained)
        model = trainer.TrainableSDXL(unet, trained).train()
        adapters = list(model.adapters.values())
        state = trainer.OPTIMIZERS[args.optimizer].state_bytes + 4 * args.use_ema
        moments = [torch.empty(adapter.numel() * state, dtype=torch.uint8) for adapter in adapters]
        self.meter.begin()
        self.meter.trained = sum(tensor.nbytes for tensor in (*adapters, *moments))
        rows = args.train_batch_size * self.run.prior.rows
        ids = torch.zeros(rows, self.encoders[0].config.max_position_embeddings, dtype=torch.long)
        latents = torch.empty(2, rows, 4, self.side, self.side)
        text = (ids, ids) if trained else self.text(rows, self.run.dtype)
        batch = trainer.Batch(*latents, text, torch.empty(rows, 6), torch.empty(rows), args.train_batch_size)
        trainer.diffusion_loss(model, self.objective, batch).total.backward()
        norm = torch.nn.utils.get_total_norm([adapter.grad for adapter in adapters])
        torch.nn.utils.clip_grads_with_norm_(adapters, args.max_grad_norm, norm)
        del moments


PHASES: dict[str, Callable[[MemoryEstimator], None]] = {
    "class pictures": lambda of: of.drawing(trainer.class_batch_size(of.args), trainer.class_dtype(of.run),
                                            (of.side, of.side)),
    "latents": MemoryEstimator.pictures,
    "validation": lambda of: of.drawing(1, of.run.dtype, of.drawn),
    "decoding": MemoryEstimator.decoding,
    "training": MemoryEstimator.training,
    "prompts": MemoryEstimator.prompts,
}


def phases_of(run: Run) -> list[str]:
    """Return the phases that a run will have."""
    generates = run.prior.rows == 2 and not run.prior.is_base_model
    left_out = {"class pictures": not generates, "validation": not run.prompts,
                "decoding": not generates and not run.prompts, "prompts": run.text.is_trained}
    return [name for name in PHASES if not left_out.get(name)]


@torch.no_grad()
def estimate_phase(run: Run, phase: str) -> MemoryMeter:
    """Return the cost of a phase; no weight is read and no kernel is run."""
    if run.args.base_precision == "nf4":
        trainer.PackedLinear(nn.Linear(64, 64), "nf4", torch.device("cpu"))  # its tables need real numbers, once
    estimator = MemoryEstimator(run)
    with torch.device("meta"), fused_attention(), estimator.meter:
        PHASES[phase](estimator)
    return estimator.meter


def estimate_memory(run: Run) -> dict[str, MemoryMeter]:
    """Return the cost of each phase that the run will have."""
    return {phase: estimate_phase(run, phase) for phase in phases_of(run)}


def largest(costs: dict[str, MemoryMeter]) -> tuple[str, float]:
    """Return the phase with the highest peak, and that in GB."""
    name = max(costs, key=lambda phase: costs[phase].peak)
    return name, costs[name].peak / GB


def with_flags(run: Run, **flags: Any) -> Run:
    """Return the run with other flags."""
    args = argparse.Namespace(**{**vars(run.args), **flags})
    return replace(run, args=args, text=trainer.choose_text(args), prior=trainer.choose_prior(args))


def fit_budget(run: Run, budget: float) -> tuple[Run, str, float]:
    """Return the run with the flags, cheapest in time first, with which all phases fit in `budget` GB.

    Returns its largest phase, too, with its peak in GB. What saves memory already stays. Raises UserError naming the
    smallest budget that would do.
    """
    args, all_blocks = run.args, len(trainer.blocks_of(trainer.meta_model(run.base, "unet")))
    least = min(all_blocks, trainer.checkpointed(args))
    counts = dict.fromkeys(max(least, round(all_blocks * eighth / EIGHTHS)) for eighth in range(EIGHTHS + 1))
    smaller = ("int8", "nf4") if args.base_precision == "auto" and not args.use_dora else ()  # DoRA needs it unpacked
    candidates = [*((args.base_precision, count) for count in counts), *((kind, all_blocks) for kind in smaller)]

    def fitted(precision: str, count: int) -> Run:
        return with_flags(run, base_precision=precision, gradient_checkpointing=count == all_blocks or count)

    @functools.cache
    def cost(phase: str, precision: str, count: int) -> MemoryMeter:
        return estimate_phase(fitted(precision, count), phase)

    def evaluate(number: int) -> tuple[Run, str, float]:
        precision, count = candidates[number]
        chosen = fitted(precision, count)
        # to the other phases it matters only whether blocks are checkpointed
        costs = {phase: cost(phase, precision, count if phase == "training" else min(count, 1))
                 for phase in phases_of(chosen)}
        return chosen, *largest(costs)

    found = bisect.bisect_left(range(len(candidates)), True, key=lambda number: evaluate(number)[2] <= budget)
    chosen, name, peak = evaluate(min(found, len(candidates) - 1))
    if peak > budget:
        raise UserError(f"{budget:.3g} GB are too few: with all that saves memory the largest phase, {name}, takes "
                        f"{math.ceil(100 * peak) / 100:g} GB; {CURES.get(name, 'a smaller --resolution')} helps.")
    return chosen, name, peak


def flags_of(before: argparse.Namespace, after: argparse.Namespace) -> str:
    """Return the flags that fit_budget chose, as words of a command line."""
    words = []
    if after.gradient_checkpointing != before.gradient_checkpointing:
        count = after.gradient_checkpointing
        words.append("--gradient_checkpointing" + ("" if count is True else f" {count}"))
    if after.base_precision != before.base_precision:
        words.append(f"--base_precision {after.base_precision}")
    return " ".join(words)


def print_table(costs: dict[str, MemoryMeter]) -> None:
    """Print what each phase takes."""
    print(f"{'computed':15}{'peak GB':>9}{'frozen':>9}{'trained':>9}{'at work':>9}{'TFLOP':>9}{'launches':>10}")
    for phase, cost in costs.items():
        sizes = (cost.peak, cost.weights - cost.trained, cost.trained, cost.peak - cost.weights)
        print(f"{phase:15}{''.join(f'{size / GB:9.3f}' for size in sizes)}{cost.flops / 1e12:9.3g}{cost.launches:10,}")
    print("Trained: adapters and optimizer states. At work: what else lives at the peak, gradients included.")
    print("TFLOP and launches are of one picture, one prompt, one denoising step and one training step.")


def main() -> None:
    """Print the table, and with --budget the flags that fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python tools/estimate_memory.py [--budget GB] TRAINING_FLAGS",
                                     allow_abbrev=False)
    parser.add_argument("--budget", type=trainer.POSITIVE, metavar="GB",
                        help="find the flags, cheapest in time first, with which the run fits in so many GB")
    own, words = parser.parse_known_args()
    with trainer.one_sentence():
        args = trainer.parse_args([*words, "--dry_run", "--report_to=none"], with_weights=False)
        run = trainer.start(args)
        if own.budget:
            chosen, name, peak = fit_budget(run, own.budget)
            print_table(estimate_memory(chosen))
            added = flags_of(run.args, chosen.args)
            print(f"It fits in {own.budget:.3g} GB with {added or 'these flags'}: the largest phase, {name}, takes "
                  f"{peak:.3g} GB.")
            return
        costs = estimate_memory(run)
        print_table(costs)
        name, peak = largest(costs)
        card = next((card for card in CARDS if peak <= card), None)
        fits = f"a card of {card} GB is enough" if card else f"no card of up to {CARDS[-1]} GB is enough"
        print(f"The largest phase, {name}, takes {peak:.3g} GB: {fits}.")


if __name__ == "__main__":
    main()
