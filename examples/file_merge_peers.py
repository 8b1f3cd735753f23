"""What ``file_merge_times.py`` measures beside: mergekit's program, and FusionBench."""

import json
import resource
import subprocess
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file

MERGEKIT = {
    "average": {"merge_method": "linear", "parameters": {"weight": 1.0}},
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"weight": 0.1}},
    "ties": {"merge_method": "ties", "parameters": {"weight": 0.3, "density": 0.2}},
}
FUSION_BENCH = {
    "average": ("SimpleAverageAlgorithm", {}),
    "task_arithmetic": ("TaskArithmeticAlgorithm", {"scaling_factor": 0.3}),
    "ties": (
        "TiesMergingAlgorithm",
        {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"},
    ),
}


def resident() -> int:
    """Bytes of memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure_mergekit(place: Path, label: str, program: str, dtype: str) -> tuple[float, float]:
    """The same of mergekit, as JSON is YAML."""
    files = {name: str(place / name / "model.safetensors") for name in ("base", "first", "second", "third")}
    size = Path(files["base"]).stat().st_size
    base = {} if label == "average" else {"base_model": files.pop("base")}
    files.pop("base", None)
    models = [{"model": file} for file in files.values()]
    config = place / "mergekit.yml"
    config.write_text(json.dumps({"models": models, "dtype": "float32", "out_dtype": dtype, **base, **MERGEKIT[label]}))
    subprocess.run([program, "--help"], check=True, capture_output=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([program, "--quiet", str(config), str(place / "mergekit")], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, (after.ru_maxrss - before.ru_maxrss) * 1024 / size


def load(model: str, file: str) -> torch.nn.Module:
    """A model with the weights of a file; FusionBench calls this when it needs one."""
    with torch.device("meta"):
        module = timm.create_model(model, num_classes=0)
    module.load_state_dict(load_file(file), assign=True)
    return module


def measure_fusionbench(place: Path, label: str, model: str) -> tuple[float, float]:
    """The same of FusionBench."""
    from fusion_bench import method as methods
    from fusion_bench.modelpool import BaseModelPool
    from omegaconf import OmegaConf

    name, settings = FUSION_BENCH[label]
    files = {"_pretrained_": "base", "a": "first", "b": "second", "c": "third"}
    target = {"_target_": f"{__name__}.load", "model": model}
    models = {key: {**target, "file": str(place / file / "model.safetensors")} for key, file in files.items()}
    before, started = resident(), time.process_time()
    merged = getattr(methods, name)(**settings).run(BaseModelPool(OmegaConf.create(models)))
    save_file(merged.state_dict(), place / "fusionbench.safetensors")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return time.process_time() - started, peak / (place / "base" / "model.safetensors").stat().st_size
