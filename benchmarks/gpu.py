"""What the trainer does on a GPU: speed, memory, exactness and learning, in one command of at most six minutes.

    python benchmarks/gpu.py --out gpu                     # an NVIDIA card with 40 GB or more
    python benchmarks/gpu.py --out gpu --parts step graph
    python benchmarks/gpu.py --out gpu --tiny              # on a CPU, with the toy model: shows that every part runs

Each part writes its rows to gpu/PART.jsonl as soon as it has them; gpu/gpu.json has all of them, and the card's name.
A part that fails or takes too long costs the others nothing. SDXL has its own configuration and random weights here;
the toy model is trained and judged as it is. An older machine needs diffusers alone: `pip install --no-deps --target
FOLDER diffusers`, and FOLDER in PYTHONPATH.
"""

import argparse
import functools
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error",
                  DIFFUSERS_VERBOSITY="error")
ROOT = Path(__file__).parent.parent
TOY = ROOT / "examples" / "toy_world"
SCRIPT = ROOT / "train_dreambooth_lora_sdxl.py"
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks"), str(TOY)]

STAGES = [  # one after the other; in each, processes beside each other with one or more parts in turn
    [("toy", "exact"), ("computed",)],
    [("ceilings", "step", "graph", "kernels", "estimate", "smaller")],
    [("compile",)],
]
SECONDS = 350  # for all; what runs then is ended


class Lab:
    """Full-size SDXL with random weights on the device, or the toy model's configuration, and steps to time on it."""

    def __init__(self, tiny: bool, folder: Path, flags: Sequence[str] = ()) -> None:
        import full_size
        import torch
        from accelerate.state import AcceleratorState, PartialState

        import train_dreambooth_lora_sdxl as trainer

        self.torch, self.trainer, self.tiny = torch, trainer, tiny
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        trainer.load_part = full_size.random_weights
        base = TOY / "model" if tiny else folder / "sdxl"
        if not base.exists():
            full_size.write_configuration(base)
        self.run = full_size.start_run(base, folder, list(flags), 64 if tiny else 1024)
        self.device, self.on_gpu = self.run.device, self.run.device.type == "cuda"
        self.empty()  # of another lab's model
        self.allocated = torch.cuda.memory_allocated() if self.on_gpu else 0
        self.model = trainer.load_trainable(self.run).train()
        self.adapters = list(self.model.adapters.values())
        self.objective = trainer.make_objective(self.run.args, self.run.scheduler, self.device)
        self.random_batch = functools.partial(full_size.random_batch, self.run, self.model)

    def empty(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if self.on_gpu:
            self.torch.cuda.empty_cache()

    def sync(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            self.torch.cuda.synchronize()

    def recompute(self, blocks: Sequence[Any]) -> None:
        """Recompute the activations of these blocks, and of no others."""
        checkpoint, chosen = self.torch.utils.checkpoint.checkpoint, set(blocks)
        self.model.unet.enable_gradient_checkpointing(
            lambda block, *inputs: checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            if block in chosen else block(*inputs))

    def update(self, gradients: Callable[[], Any], optimizer: Any, keep: bool = False) -> Callable[[], None]:
        """A whole step: gradients, clipping, optimizer."""
        accelerator = self.run.accelerator
        accelerator._optimizers.clear()
        optimizer = accelerator.prepare(optimizer)

        def step() -> None:
            gradients()
            accelerator._optimizers[:] = [optimizer]
            accelerator.clip_grad_norm_(self.adapters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not keep)

        return step

    def ours(self, batch: Any) -> Callable[[], None]:
        """The trainer's own step."""
        gradients = functools.partial(self.gradients, batch)
        return self.update(gradients, self.trainer.make_optimizer(self.run.args, self.model, 1))

    def gradients(self, batch: Any) -> Any:
        """Add a micro-batch's gradients to the adapters' and return its loss."""
        loss = self.trainer.diffusion_loss(self.model, self.objective, batch)
        self.run.accelerator.backward(loss.total)
        return loss.total.detach()

    def usual(self, batch: Any) -> Callable[[], None]:
        """The usual loop: peft's forward under autocast, torch.optim.AdamW."""

        def gradients() -> None:
            with self.torch.autocast(self.device.type, self.model.dtype):
                loss = self.trainer.diffusion_loss(self.model, self.objective, batch)
            self.run.accelerator.backward(loss.total)

        return self.update(gradients, self.torch.optim.AdamW(self.adapters, lr=1e-4))

    def graphed(self, batch: Any) -> Callable[[], None]:
        """The trainer's own step, its gradients by a CUDA graph."""
        return self.update(self.captured(batch), self.trainer.make_optimizer(self.run.args, self.model, 1), keep=True)

    def captured(self, batch: Any) -> Callable[[], Any]:
        """Record the gradients of a batch as a CUDA graph and return its replay; on a CPU, compute them each time.

        As in PyTorch's notes on CUDA, "whole-network capture": three steps on a side stream come first, in which
        libraries choose their kernels and make their workspaces.
        """
        work, cuda = functools.partial(self.gradients, batch), self.torch.cuda
        if not self.on_gpu:
            return work
        for adapter in self.adapters:  # their addresses are recorded
            adapter.grad = self.torch.zeros_like(adapter)
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(3):
                work()
        cuda.current_stream().wait_stream(stream)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may pin memory
            loss = work()

        def replay() -> Any:
            graph.replay()
            return loss

        return replay

    def seconds(self, step: Callable[[], None], count: int) -> float:
        """Seconds of a step, the mean of so many."""
        self.sync()
        began = time.perf_counter()
        for _ in range(count):
            step()
        self.sync()
        return (time.perf_counter() - began) / count

    def compare(self, steps: dict[str, tuple[bool, Callable[[], None]]]) -> dict[str, dict[str, float]]:
        """Seconds and peak GB of steps that take turns; with each, whether the fused LoRA forward is on."""
        found: dict[str, list[float]] = {name: [] for name in steps}
        peaks, turns, count = {}, (1 if self.tiny else 3), (1 if self.tiny else 3)
        for turn in range(1 + turns):
            for name, (is_lean, step) in steps.items():
                self.model.use_fused_lora(is_lean)
                with self.peak() as peak:
                    taken = self.seconds(step, count)
                if turn:  # the first one is to warm up
                    found[name].append(taken)
                    peaks[name] = peak["gb"]
        self.model.use_fused_lora(True)
        return {name: {"seconds": statistics.median(times), "peak_gb": peaks[name]} for name, times in found.items()}

    @contextmanager
    def peak(self) -> Iterator[dict[str, float]]:
        """The most that is allocated on the GPU meanwhile, beyond what was there before the model, in GB."""
        measured = {"gb": 0.0}
        if self.on_gpu:
            self.torch.cuda.reset_peak_memory_stats()
        yield measured
        if self.on_gpu:
            measured["gb"] = (self.torch.cuda.max_memory_allocated() - self.allocated) / 1e9

    def launches(self, step: Callable[[], None]) -> int:
        """How many kernels, or on a CPU operators, a step launches."""
        kinds = self.torch.profiler.ProfilerActivity
        activities = [kinds.CPU, kinds.CUDA] if self.on_gpu else [kinds.CPU]
        with self.torch.profiler.profile(activities=activities) as profile:
            step()
            self.sync()
        if self.on_gpu:
            return sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)
        return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


Emit = Callable[..., None]


def ceilings(lab: Lab, emit: Emit) -> None:
    """Measure the rates of a bf16 matrix product and of a copy on the device."""
    torch, side = lab.torch, 256 if lab.tiny else 8192
    one = torch.randn(side, side, device=lab.device, dtype=torch.bfloat16)
    lab.seconds(lambda: one @ one, 3)
    emit(what="bf16 matrix product", tflops=2 * side**3 / lab.seconds(lambda: one @ one, 10) / 1e12)
    source, target = torch.empty(side, side, 4, device=lab.device), torch.empty(side, side, 4, device=lab.device)
    lab.seconds(lambda: target.copy_(source), 2)
    taken = lab.seconds(lambda: target.copy_(source), 10)
    emit(what="copy on the device", gb_per_second=2 * source.nbytes / taken / 1e9)


def step(lab: Lab, emit: Emit) -> None:
    """Time steps of SDXL at 1024 px: this trainer and the usual loop in turns."""
    blocks = lab.trainer.blocks_of(lab.model.unet)
    cases = [(1, "all kept", []), (1, "half of the blocks", blocks[:len(blocks) // 2]), (1, "all blocks", blocks),
             (4, "all kept", [])]
    for rows, name, recomputed in cases:
        lab.recompute(recomputed)
        batch = lab.random_batch(rows)
        steps = {"usual": (False, lab.usual(batch)), "ours": (True, lab.ours(batch))}
        found = lab.compare(steps)
        ratio = found["usual"]["seconds"] / found["ours"]["seconds"]
        counts = {}
        for loop, (is_lean, work) in steps.items() if rows == 1 and not recomputed else ():
            lab.model.use_fused_lora(is_lean)
            counts[loop] = {"launches": lab.launches(work)}
        lab.model.use_fused_lora(True)
        for loop, figures in found.items():
            emit(loop=loop, batch=rows, recomputed=name, precision=lab.run.accelerator.mixed_precision, **figures,
                 **counts.get(loop, {}), times_the_usual=ratio if loop == "ours" else 1.0)
    lab.recompute([])


def smaller(tiny: bool, folder: Path, emit: Emit) -> None:
    """Time the same in fp16 and with quantized weights; each needs a model of its own."""
    sets = {"fp16": ["--mixed_precision=fp16"], "int8": ["--base_precision=int8"],
            "nf4": ["--base_precision=nf4"]}
    for name, flags in sets.items():
        if name == "nf4" and not importable("bitsandbytes"):
            emit(loop="ours", precision=name, left_out="bitsandbytes is not installed")
            continue
        with report_error(emit, precision=name):
            lab = Lab(tiny, folder, flags)
            batch = lab.random_batch(1)
            steps = {"ours": (True, lab.ours(batch))}
            if name == "fp16":
                steps["usual"] = False, lab.usual(batch)
            for loop, figures in lab.compare(steps).items():
                emit(loop=loop, batch=1, recomputed="all kept", precision=name, **figures)
            del lab, steps, batch


def graph(lab: Lab, emit: Emit) -> None:
    """Compare a micro-batch as a CUDA graph with eager mode: its numbers and its seconds."""
    blocks = lab.trainer.blocks_of(lab.model.unet)
    for name, recomputed in (("all kept", []), ("all blocks", blocks)):
        lab.recompute(recomputed)
        batch = lab.random_batch(1)
        compare_gradients(lab, batch, functools.partial(emit, recomputed=name))
        found = lab.compare({"eager": (True, lab.ours(batch)), "graph": (True, lab.graphed(batch))})
        for kind, figures in found.items():
            emit(recomputed=name, kind=kind, **figures,
                 times_eager=found["eager"]["seconds"] / figures["seconds"])
    lab.recompute([])


def compare_gradients(lab: Lab, batch: Any, emit: Emit) -> None:
    """Compare loss and gradients of a graph and of eager mode for two seeds, as shares of the largest number."""
    eager, graphed = functools.partial(lab.gradients, batch), lab.captured(batch)

    def numbers(work: Callable[[], Any], seed: int) -> Any:
        for adapter in lab.adapters:
            adapter.grad = lab.torch.zeros_like(adapter) if adapter.grad is None else adapter.grad.zero_()
        lab.trainer.seed_device(seed, lab.device)
        loss = work()
        return lab.torch.cat([loss.view(1), *(adapter.grad.flatten() for adapter in lab.adapters)])

    for seed in (1, 2):
        first, again, graph_ = numbers(eager, seed), numbers(eager, seed), numbers(graphed, seed)
        size = first.abs().max()
        emit(seed=seed, worst_difference=float((graph_ - first).abs().max() / size),
             of_eager_itself=float((again - first).abs().max() / size))
    lab.model.zero_grad()


def kernels(lab: Lab, emit: Emit) -> None:
    """Measure what the trainer's own code gains: the fused LoRA forward, the order of blocks."""
    torch, trainer, batch = lab.torch, lab.trainer, lab.random_batch(1)
    fused, plain = lab.model, trainer.TrainableSDXL(lab.model.unet, compiled=True)
    for name, model in (("fused LoRA forward", fused), ("plain LoRA forward", plain)):
        lab.model = model
        emit(what=name, **lab.compare({name: (True, lab.ours(batch))})[name])
    lab.model = fused
    fused.use_fused_lora(True)
    blocks = trainer.blocks_of(fused.unet)
    for name, half in (("first", blocks[:len(blocks) // 2]), ("last", blocks[len(blocks) // 2:])):
        lab.recompute(half)
        emit(what=f"the {name} half of the blocks recomputed", **lab.compare({name: (True, lab.ours(batch))})[name])
    lab.recompute([])
    for name in ("whole", "tiles"):
        for dtype in (torch.bfloat16, torch.float32):
            what = f"VAE decodes in {name}, {str(dtype).partition('.')[2]}"
            with report_error(emit, what=what):
                emit(what=what, **decoding(lab, name, dtype))


def decoding(lab: Lab, name: str, dtype: Any) -> dict[str, float]:
    """Return seconds and peak GB of decoding a picture whole, or in diffusers' tiles."""
    torch, trainer, side = lab.torch, lab.trainer, 8 if lab.tiny else 128
    lab.allocated = torch.cuda.memory_allocated() if lab.on_gpu else 0
    vae = trainer.load_part(lab.run.vae, "vae", dtype, lab.device)
    if name == "tiles":
        vae.enable_tiling()
    latents = torch.randn(1, 4, side, side, device=lab.device, dtype=dtype)
    trainer.decode_latents(vae, [latents])
    with lab.peak() as peak:
        taken = lab.seconds(lambda: trainer.decode_latents(vae, [latents]), 1 if lab.tiny else 3)
    return {"seconds": taken, "peak_gb": peak["gb"]}


def computed(tiny: bool, folder: Path, emit: Emit) -> None:
    """Compute what tools/estimate_memory.py says, which the part `estimate` compares with the card."""
    import estimate_memory
    import full_size

    base = TOY / "model" if tiny else full_size.write_configuration(folder / "sdxl")
    for name, flags in ESTIMATED.items():
        run = full_size.start_run(base, folder, flags, 64 if tiny else 1024)
        for phase, cost in estimate_memory.estimate_memory(run).items():
            emit(flags=name, phase=phase, gb=cost.peak / 1e9, tflop=cost.flops / 1e12)


ESTIMATED = {"all kept": [], "all blocks": ["--gradient_checkpointing"]}


def estimate(tiny: bool, folder: Path, emit: Emit) -> None:
    """Measure the peak memory of each phase, and by how many per cent the computed one is off."""
    rows = map(json.loads, (emit.keywords["out"] / "computed.jsonl").read_text().splitlines())
    said = {(row["flags"], row["phase"]): row["gb"] for row in rows if "gb" in row}
    for name, flags in ESTIMATED.items():
        lab = Lab(tiny, folder, flags)
        torch, trainer, run = lab.torch, lab.trainer, lab.run
        work = lab.ours(lab.random_batch(1))
        work()
        with lab.peak() as peak:
            work()
        peaks = {"training": peak["gb"]}
        with lab.peak() as peak, torch.no_grad(), trainer.inference_adapters(lab.model):
            lab.model(*validation_inputs(lab))
        peaks["validation"] = peak["gb"]
        side = run.args.resolution // run.vae_factor
        with trainer.offloaded(run, lab.model), lab.peak() as peak:
            trainer.decode_latents(trainer.load_vae(run.vae, run.dtype, lab.device), [torch.randn(1, 4, side, side)])
        peaks["decoding"] = peak["gb"]
        lab.model = lab.adapters = work = None
        lab.empty()
        peaks |= other_phases(lab)
        for phase, gb in peaks.items():
            off = 100 * (said[name, phase] / gb - 1) if gb and (name, phase) in said else None
            emit(flags=name, phase=phase, measured_gb=gb, computed_gb=said.get((name, phase)), per_cent_off=off)
        del lab


def validation_inputs(lab: Lab) -> tuple:
    """Return inputs of two rows, as classifier-free guidance has them."""
    batch = lab.random_batch(2)
    return batch.mean, lab.torch.tensor([500, 500], device=lab.device), batch.text, batch.add_time_ids


def other_phases(lab: Lab) -> dict[str, float]:
    """Return the peaks of encoding a picture and a prompt, in GB."""
    torch, trainer, run, peaks = lab.torch, lab.trainer, lab.run, {}
    lab.allocated = torch.cuda.memory_allocated() if lab.on_gpu else 0
    with lab.peak() as peak:
        vae = trainer.load_part(run.vae, "vae", torch.float32, lab.device)
        trainer.encode_image(vae, torch.rand(3, run.args.resolution, run.args.resolution), "noise")
    peaks["latents"] = peak["gb"]
    del vae
    lab.empty()
    with lab.peak() as peak, torch.no_grad():
        encoder = trainer.load_part(run.base, "text_encoder_2", run.dtype, lab.device)
        length = encoder.config.max_position_embeddings
        encoder(torch.zeros(1, length, dtype=torch.long, device=lab.device), output_hidden_states=True)
    peaks["prompts"] = peak["gb"]
    return peaks


def compile_(tiny: bool, folder: Path, emit: Emit) -> None:
    """Time torch.compile, regional, whole, and with CUDA graphs: seconds to the first step, and of those after."""
    kinds = {"regional": "default", "full": "default", "graphs": "reduce-overhead"}
    for kind, mode in list(kinds.items())[:1 if tiny else 3]:
        with report_error(emit, kind=kind):
            began = time.perf_counter()
            os.environ["ACCELERATE_DYNAMO_BACKEND"] = "aot_eager" if tiny else "inductor"  # which would take a minute
            os.environ["ACCELERATE_DYNAMO_MODE"] = "default" if tiny else mode
            os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = str(kind == "regional")
            lab = Lab(tiny, folder)
            work, loaded = lab.ours(lab.random_batch(1)), time.perf_counter()
            lab.seconds(work, 1)
            first = time.perf_counter() - loaded
            emit(kind=kind, load_seconds=loaded - began, first_step_seconds=first,
                 **lab.compare({kind: (True, work)})[kind], graphs=lab.trainer.graphs_compiled())
            del lab, work


def toy(tiny: bool, folder: Path, emit: Emit) -> None:
    """Run the README's quick start on this device, in all precisions at once, and judge its pictures."""
    import torch

    on_gpu = torch.cuda.is_available()
    runs = {}
    for precision in ("no", "bf16", "fp16") if on_gpu else ("no",):
        flags = [f"--mixed_precision={precision}", f"--output_dir={folder / precision}", "--report_to=none"]
        flags += ["--max_train_steps=2", "--num_validation_images=1", "--validation_prompt=a dog --s 2"] * tiny
        runs[precision] = time.perf_counter(), start(["--config", str(TOY / "sks_dog.yaml"), *flags])
    for precision, (began, process) in runs.items():
        errors = process.communicate()[1]
        if process.returncode:
            emit(precision=precision, error=errors[-2000:])
            continue
        history = [json.loads(line) for line in (folder / precision / "history.jsonl").read_text().splitlines()]
        pictures = 1 if tiny else 5
        with report_error(emit, precision=precision):
            seen = judged(folder / precision, pictures, "cuda" if on_gpu else "cpu")
            emit(precision=precision, seconds=time.perf_counter() - began, loss=history[-1]["loss"],
                 samples_per_second=history[-1]["samples_per_second"], peak_gb=history[-1]["peak_memory_gb"], **seen)
    shutil.copytree(folder, emit.keywords["out"] / "toy", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("checkpoint-*", "cache", "*.safetensors"))


def judged(lora: Path, a_place: int, device: str) -> dict[str, float]:
    """Return how many per cent of the pictures show subject and place, and of the class prompt's a plain dog."""
    import diffusers
    import torch
    import transformers
    from diffusers import StableDiffusionXLPipeline
    from judge import Judge
    from scene import PLACES

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    pipeline = StableDiffusionXLPipeline.from_pretrained(TOY / "model", torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    places = [place for place in PLACES for _ in range(a_place)]
    prompts = [*(f"a photo of a sks dog {place}" for place in places), *["a photo of a dog"] * len(places)]
    generators = [torch.Generator().manual_seed(seed % len(places)) for seed in range(len(prompts))]
    found = Judge()(pipeline(prompts, num_inference_steps=25, generator=generators).images)
    shown, plain = found[:len(places)], found[len(places):]

    def share(values: Iterator[bool]) -> float:
        return 100 * statistics.mean(map(float, values))

    return {"subject_shown": share(verdict.subjects["sks_dog"] > 0.5 for verdict in shown),
            "place_right": share(verdict.place == place for verdict, place in zip(shown, places, strict=True)),
            "class_kept": share(v.class_name == "dog" and v.subjects["sks_dog"] < 0.5 for v in plain)}


def start(words: Sequence[str]) -> subprocess.Popen:
    """Start the script."""
    threads = {} if os.path.exists("/dev/nvidiactl") else {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(SCRIPT), *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True, cwd=ROOT, env={**os.environ, **threads})


def exact(tiny: bool, folder: Path, emit: Emit) -> None:
    """Compare the bits of a run with those of the same run again, and resumed."""
    import torch
    from safetensors.torch import load_file

    steps, precisions = (2 if tiny else 20), ("no", "bf16")[:1 if tiny else 2]
    common = ["--config", str(TOY / "sks_dog.yaml"), "--report_to=none", "--lr_scheduler=constant",
              f"--checkpointing_steps={steps // 2}", "--log_level=error", f"--cache_latents_dir={folder / 'cache'}"]

    def words(precision: str, name: str, *more: str) -> list[str]:
        return [*common, f"--mixed_precision={precision}", f"--output_dir={folder / f'{precision}-{name}'}",
                "--validation_steps=10000", "--num_validation_images=1", "--validation_prompt=a dog --s 2", *more]

    kinds = {"whole": [f"--max_train_steps={steps}"], "again": [f"--max_train_steps={steps}"],
             "resumed": [f"--max_train_steps={steps // 2}"]}
    running = {(p, name): start(words(p, name, *more)) for p in precisions for name, more in kinds.items()}
    ended = {key: (process.communicate()[1], process.returncode) for key, process in running.items()}
    failed = {key: errors for key, (errors, code) in ended.items() if code}
    for precision in precisions:
        resumed = start(words(precision, "resumed", f"--max_train_steps={steps}", "--resume_from_checkpoint=latest"))
        errors = resumed.communicate()[1]
        failed |= {(precision, "resumed"): errors} if resumed.returncode else {}
        loras = {name: load_file(folder / f"{precision}-{name}" / "pytorch_lora_weights.safetensors")
                 for name in kinds if (precision, name) not in failed}
        for name in [*kinds][1:]:
            if (precision, name) in failed or "whole" not in loras:
                error = failed.get((precision, name), "the whole run failed")[-2000:]
                emit(precision=precision, what=name, error=error)
                continue
            differences = [(loras["whole"][key] - loras[name][key]).abs().max().item() for key in loras["whole"]]
            emit(precision=precision, what=name, same_bits=max(differences) == 0, worst_difference=max(differences))
    if torch.cuda.is_available():
        emit(what="operators that PyTorch calls nondeterministic", names=nondeterministic(folder))


def nondeterministic(folder: Path) -> list[str]:
    """Return the operators of a step of which use_deterministic_algorithms warns."""
    lab = Lab(True, folder)
    work = lab.ours(lab.random_batch(1))
    lab.torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return sorted({str(warning.message).split(" ")[0] for warning in caught if "determinis" in str(warning.message)})


def importable(name: str) -> bool:
    """Return whether a package is installed."""
    import importlib.util

    return importlib.util.find_spec(name) is not None


@contextmanager
def report_error(emit: Emit, **row: Any) -> Iterator[None]:
    """Write a row with the error instead of ending the part; one of CUDA itself ends the process."""
    try:
        yield
    except Exception as error:  # whatever a kernel raises
        emit(**row, error=f"{type(error).__name__}: {error}"[:500])
        traceback.print_exc()
        if "CUDA error" in str(error):
            raise


WITH_LAB: dict[str, Callable[[Lab, Emit], None]] = {"ceilings": ceilings, "step": step, "graph": graph,
                                                    "kernels": kernels}
WITHOUT: dict[str, Callable[[bool, Path, Emit], None]] = {
    "toy": toy, "exact": exact, "computed": computed, "smaller": smaller, "estimate": estimate, "compile": compile_}


def write_row(part: str, out: Path, began: float, **row: Any) -> None:
    """Write a row at once, and print it."""
    row |= {"at": round(time.perf_counter() - began, 1)}
    with open(out / f"{part}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(part, shown(row), flush=True)


def shown(row: dict[str, Any]) -> str:
    """Return a row as one line."""
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in row.items())


def run_parts(parts: Sequence[str], tiny: bool, out: Path) -> None:
    """Run parts one after the other in this process."""
    import torch

    import train_dreambooth_lora_sdxl as trainer

    trainer.quiet_libraries("error")
    if not torch.cuda.is_available():
        import half_precision

        torch.set_num_threads(1)
        half_precision.allow_fp16()
    began, lab = time.perf_counter(), None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in parts:
            emit = functools.partial(write_row, part, out=out, began=began)
            with report_error(emit):  # the next parts may still run
                lab = (lab or Lab(tiny, folder)) if part in WITH_LAB else None
                WITH_LAB[part](lab, emit) if part in WITH_LAB else WITHOUT[part](tiny, folder, emit)
                emit(done=True)


def finished(out: Path, part: str) -> bool:
    """Return whether a part is done, or has failed as a whole."""
    path = out / f"{part}.jsonl"
    rows = list(map(json.loads, path.read_text().splitlines())) if path.exists() else []
    return any(row.get("done") or set(row) == {"error", "at"} for row in rows)


def collect(out: Path, parts: Sequence[str]) -> dict[str, list[dict]]:
    """Write gpu.json from what the parts have written so far."""
    paths = {part: out / f"{part}.jsonl" for part in parts}
    found = {part: list(map(json.loads, path.read_text().splitlines())) for part, path in paths.items()
             if path.exists()}
    (out / "gpu.json").write_text(json.dumps({"machine": machine(), "parts": found}, indent=1))
    return found


@functools.cache
def machine() -> dict[str, str]:
    """Return the name of the card, and the versions."""
    code = ("import torch, diffusers, transformers, accelerate, peft, json\n"
            "card = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'\n"
            "print(json.dumps({'card': card, 'cuda': str(torch.version.cuda), **{m.__name__: m.__version__ for m in "
            "(torch, diffusers, transformers, accelerate, peft)}}))")
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {"card": "unknown"}


def child(parts: Sequence[str], tiny: bool, out: Path) -> subprocess.Popen:
    """Start a process for some parts."""
    words = [sys.executable, __file__, "--out", str(out), "--parts", *parts, "--child", *["--tiny"] * tiny]
    return subprocess.Popen(words)


def run_stage(processes: Sequence[Sequence[str]], tiny: bool, out: Path, deadline: float) -> None:
    """Run processes beside each other; one that dies is started again with the parts that it did not finish."""
    running = {tuple(parts): child(parts, tiny, out) for parts in processes if parts}
    while running:
        is_late = time.perf_counter() > deadline
        over = [parts for parts, process in running.items() if is_late or process.poll() is not None]
        for parts in over:
            process = running.pop(parts)
            process.kill()
            process.wait()
            left = [part for part in parts if not finished(out, part)][1:]  # the first of them is what failed
            if left and not is_late:
                running[tuple(left)] = child(left, tiny, out)
        collect(out, PARTS)
        time.sleep(0.5)


PARTS = [part for stage in STAGES for parts in stage for part in parts]


def main() -> None:
    """Run all parts, or those that are asked for, and print their rows again at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for gpu.json; it is emptied")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what is not done by then is left out")
    parser.add_argument("--tiny", action="store_true", help="the toy model, a step or two of everything")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    if args.child:
        run_parts(args.parts, args.tiny, args.out)
        return
    began = time.perf_counter()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    wanted = {*args.parts, *["computed"] * ("estimate" in args.parts)}
    print(json.dumps(machine()), flush=True)
    for stage in STAGES:
        processes = [[part for part in parts if part in wanted] for parts in stage]
        run_stage(processes, args.tiny, args.out, began + args.seconds)
    for part, rows in collect(args.out, PARTS).items():
        print(f"\n{part}")
        for row in (row for row in rows if not row.get("done")):
            print("  " + shown({key: value for key, value in row.items() if key != "at"}))
    print(f"\n{time.perf_counter() - began:.0f} seconds in all; {args.out / 'gpu.json'}")


if __name__ == "__main__":
    main()
