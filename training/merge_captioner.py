"""A registered captioner and the model it was taught on -> an -hf folder that captions: udfs/internvl.py loads it, or a server such as vLLM.

    python -m training.merge_captioner champion models/captioner-hf --config conf/demo.yaml --set train_captioner.pretrained=models/InternVL3-8B-hf

The first word is an alias or a number of a version of `train_captioner.model`, or a folder with its files. The weights keep the precision in which the
base model is stored; tokenizer, processor and chat template are the base model's own files, so that the model is asked as it was taught. The folder's
hash (udfs.internvl.folder_hash) is printed, stands in merged.yaml beside the weights, and is the tag `merged_sha256` of the registered version. The
folder is made as a whole or not at all. Memory: the whole model once. `--scale` says how much of the adapters is taken: 1 as trained, 0 none.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from conf.section import Mistake
from conf.settings import Settings, command_line, stop
from training import captioner_adapters, mlflow_store, promote
from training.fit_captioner import folder_of
from training.result_files import hash_files
from training.train_captioner import ABOUT, FOLDER
from udfs import internvl

RECORD = "merged.yaml"  # not among internvl.FILES: it holds their hash
MERGED = "merged_sha256"
OPTIONS: dict[str, dict[str, Any]] = {"--scale": {"type": float, "default": 1.0, "help": "of the adapters, 0 to 1 (default 1)"}}


def main() -> None:
    places = {"captioner": "alias or number of a registered version, or a folder with its files", "folder": "where the merged model goes"}
    settings, told = command_line(__doc__, places, OPTIONS)
    mlflow_store.quiet()
    try:
        with tempfile.TemporaryDirectory() as kept:
            adapter, version = find(settings, told.captioner, Path(kept))
            base = folder_of(settings.train_captioner)
            about = check(adapter, base)
            if told.plan:
                print(f"merge captioner: {adapter} onto {base} as {told.folder}; nothing is written")
                return
            sha256 = merge(adapter, base, Path(told.folder), about, told.scale)
        if version is not None and told.scale == 1.0:
            client = mlflow_store.connect(settings.mlflow)
            client.set_model_version_tag(settings.train_captioner.model, version, MERGED, sha256)
    except Mistake as error:
        stop(str(error))
    print(f"merge captioner: {told.folder}, sha256 {sha256}")


def find(settings: Settings, named: str, kept: Path) -> tuple[Path, str | None]:
    """-> the folder with the adapters' files, and the version's number where it is a registered one."""
    if (Path(named) / ABOUT).is_file():
        return Path(named), None
    client, model = mlflow_store.connect(settings.mlflow), settings.train_captioner.model
    if why := mlflow_store.unreachable(client):
        raise Mistake(f"mlflow.tracking_uri: {settings.mlflow.tracking_uri} does not answer: {why}")
    aliases = mlflow_store.find_aliases(client, model)
    version = promote.find(client, model, str(aliases.get(named, named)), aliases)
    if version.run_id is None:
        raise Mistake(f"{model} version {version.version} names no run; train it again")
    return Path(client.download_artifacts(version.run_id, FOLDER, str(kept))), str(version.version)


def check(adapter: Path, base: str) -> dict[str, Any]:
    """-> what the adapters say of themselves. Raises Mistake when a file is another, or they were taught on another model."""
    about: dict[str, Any] = json.loads((adapter / ABOUT).read_text())
    found = {name: sha256 for name, sha256 in hash_files(adapter).items() if name != ABOUT}
    if found != about["files"]:
        raise Mistake(f"captioner {adapter}: its files are {found}, {ABOUT} says {about['files']}; fetch it again")
    if (sha256 := internvl.folder_hash(base)) != about["base_sha256"]:
        raise Mistake(
            f"train_captioner.pretrained: {base} has the hash {sha256}, the captioner was taught on {about['base']} with {about['base_sha256']}"
        )
    return about


def merge(adapter: Path, base: str, folder: Path, about: dict[str, Any], scale: float = 1.0) -> str:
    """-> the hash of the folder that was made. Raises Mistake when there is one already."""
    from peft import PeftModel

    if folder.exists():
        raise Mistake(f"folder: {folder} is there already; name another, or remove it")
    model = PeftModel.from_pretrained(internvl.load_module(base, None), str(adapter))
    for layer in captioner_adapters.layers(model):
        layer.scale_layer(scale)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.merge_and_unload().save_pretrained(part, max_shard_size="5GB", safe_serialization=True)
    for path in Path(base).iterdir():  # as they are: nothing that a newer library would write anew
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".yaml") and not path.name.endswith(".index.json"):
            shutil.copy(path, part / path.name)
    sha256 = internvl.folder_hash(part)
    told = {"sha256": sha256, "base": about["base"], "base_sha256": about["base_sha256"], "scale": scale, "adapters": about["files"]}
    (part / RECORD).write_text(yaml.safe_dump(told | {"export": about["export"], "task": about["task"]}, sort_keys=False))
    part.rename(folder)
    return sha256


if __name__ == "__main__":
    main()
