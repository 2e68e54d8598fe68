"""Record what the trainer makes: the SHA-256 of the LoRA tensors of short runs on the bundled toy model, as JSON.

    python tests/record_hashes.py > before.json                 # the working tree
    python tests/record_hashes.py --commit 511eb82 > old.json   # any commit
    python tests/record_hashes.py --against before.json         # exit code 1 and the names of runs that differ

A rewrite is safe where the hashes stay. Another PyTorch or processor gives other hashes. Where flags changed their
names a run has several spellings; a commit that knows none of them reports "refused".
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "examples/toy_world"
CLASS = {"class_prompt": "a photo of a dog", "sample_batch_size": 1}
PICTURES = {**CLASS, "with_prior_preservation": True, "num_class_images": 2, "class_data_dir": "CLASS"}
TOKENS = {"train_text_encoder_ti": True, "instance_prompt": "a photo of TOK dog", "token_lr": 1e-2}
RUNS = {  # by name: flags; a list is several spellings of which a commit knows one
    "plain": {},
    "fp16": {"mixed_precision": "fp16", "max_train_steps": 1},
    "bf16": {"mixed_precision": "bf16"},
    "int8": {"base_precision": "int8"},
    "nf4": {"base_precision": "nf4"},
    "text encoders": {"train_text_encoder": True, "text_encoder_lr": 1e-2},
    "text encoders for half": {"train_text_encoder": True, "text_encoder_lr": 1e-2, "train_text_encoder_frac": 0.5},
    "new tokens": [{**TOKENS, "train_text_encoder_ti_frac": 1.0}, {**TOKENS, "train_text_encoder_frac": 1.0}],
    "new tokens for half": [{**TOKENS, "train_text_encoder_ti_frac": 0.5}, {**TOKENS, "train_text_encoder_frac": 0.5}],
    "class pictures": PICTURES,
    "base model": [{**CLASS, "with_prior_preservation": True}, {**CLASS, "prior_preservation": "base_model"}],
    "base model, text encoders": [
        {**CLASS, "with_prior_preservation": True, "train_text_encoder": True},
        {**CLASS, "prior_preservation": "base_model", "train_text_encoder": True}],
    "DoRA": {"use_dora": True},
    "rsLoRA, dropout": {"use_rslora": True, "lora_alpha": 8, "lora_dropout": 0.2},
    "full": [{"lora_layers": "full"}, {"lora_preset": "full"}],
    "blocks": {"lora_unet_blocks": "up_blocks.0=8:2e-2,mid_block"},
    "patterns": {"lora_layers": r"attn1\.to_(k|v),proj_out"},
    "v-prediction, zero SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "EDM style": {"prediction_type": "v_prediction", "do_edm_style_training": True},
    "min-SNR": {"snr_gamma": 1},
    "debiased, Huber": {"loss_weighting": "debiased", "loss_type": "huber"},
    "offset": {"noise_offset": 0.1, "min_timestep": 100},
    "adamw8bit": {"use_8bit_adam": True},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1},
    "adafactor": {"optimizer": "adafactor"},
    "schedule-free": {"optimizer": "schedule_free"},
    "EMA": {"use_ema": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
    "buckets": {"aspect_ratio_buckets": "64x64,48x80,80x48", "random_flip": True, "repeats": 2},
    "dropped captions": {"caption_dropout": 0.4},
    "checkpointed": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "masks": [{"masked_loss": True, "mask_dir": str(TOY / "subjects/sks_mug")},
              {"masked_loss": str(TOY / "subjects/sks_mug")}],
    "kohya": {"output_kohya_format": True, "lora_dtype": "fp16", "train_text_encoder": True},
    "from a LoRA": {"init_lora": "FIRST"},
    "resumed": {"resume_from_checkpoint": "checkpoint-2"},
    "two processes": {"gradient_accumulation_steps": 2},
}


def words(flags: dict, folder: Path) -> list[str]:
    """Return flags as words of a command line."""
    base = {"pretrained_model_name_or_path": TOY / "model", "instance_data_dir": TOY / "subjects/sks_dog",
            "instance_prompt": "a photo of a sks dog", "resolution": 64, "max_train_steps": 4, "seed": 3, "rank": 4,
            "train_batch_size": 2, "learning_rate": 2e-3, "report_to": "none", "log_level": "warning",
            "checkpointing_steps": 2, "cache_latents_dir": folder.parent / "cache", "output_dir": folder}
    places = {"CLASS": folder.parent / "class", "FIRST": folder.parent / "plain/pytorch_lora_weights.safetensors"}
    flags = {key: places.get(value, value) for key, value in {**base, **flags}.items()}
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in flags.items()]


def train(script: Path, flags: dict, folder: Path, processes: int = 1) -> str:
    """Train in a process of its own; returns the hash of what it wrote, or "refused"."""
    module = "torch.distributed.run"
    launcher = [sys.executable] if processes == 1 else [sys.executable, "-m", module, f"--nproc_per_node={processes}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                   "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launcher, str(script), *words(flags, folder)], env=environment, capture_output=True,
                          text=True, cwd=folder.parent)
    if done.returncode:
        print(done.stderr[-500:], file=sys.stderr)
        return "refused"
    return hash_of(folder)


def hash_of(folder: Path) -> str:
    """Return a hash of all tensors in a run's LoRA files: headers hold times."""
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{path.name} {name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


def record(script: Path, folder: Path, names: list[str]) -> dict[str, str]:
    """Run the runs; returns their hashes by name."""
    found = {}
    for name in names:
        output = folder / name
        spellings = RUNS[name] if isinstance(RUNS[name], list) else [RUNS[name]]
        if name == "resumed":
            train(script, {}, output)
        for flags in spellings:
            found[name] = train(script, flags, output, processes=1 + (name == "two processes"))
            if found[name] != "refused":
                break
        print(f"{found[name][:12]}  {name}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Record, and compare if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="run the script of this commit instead of the working tree's")
    parser.add_argument("--against", metavar="FILE", help="compare with hashes that were recorded before")
    parser.add_argument("--only", nargs="*", default=list(RUNS), metavar="NAME", help="only these runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        script = ROOT / "train_dreambooth_lora_sdxl.py"
        if args.commit:
            text = subprocess.run(["git", "show", f"{args.commit}:{script.name}"], cwd=ROOT, check=True,
                                  capture_output=True).stdout
            script = Path(name, script.name)
            script.write_bytes(text)
        found = record(script, Path(name), args.only)
    print(json.dumps(found, indent=1))
    before = json.loads(Path(args.against).read_text()) if args.against else {}
    changed = [name for name in found if name in before and found[name] != before[name]]
    print(*(f"differs: {name}" for name in changed), sep="\n", file=sys.stderr)
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main())
