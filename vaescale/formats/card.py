"""The model card of a folder for the Hugging Face Hub: README.md."""

from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ..evaluation import tables
from ..evaluation.candidate import parameters_of
from ..interfaces import Bounded, Codebooks, Codec, Sampled
from ..settings import Config

NEEDED = {"data", "images", "size", "channels", "fingerprint", "protocol"}  # in evaluation.json
USE = """\
import vaescale
model = vaescale.load("FOLDER")              # this folder, after a download
latents = model.encode("picture.jpg")        # or PIL images, arrays and tensors
images = model.decode(latents)               # uint8 [1, {size}, {size}, {channels}]"""


def card(config: Config, codec: Codec, step: int, licence: str, evaluation: dict[str, Any] | None) -> str:
    """Returns the text of the card. licence: an identifier of the Hub, such as apache-2.0, or unknown; evaluation: the
    content of the run's evaluation.json, if it is of these weights."""
    name, data = Path(config.run).name, config.data
    about: dict[str, Any] = {"license": licence, "library_name": "vaescale", "tags": _tags(config, codec)}
    if evaluation:
        about["model-index"] = [{"name": name, "results": [_result(evaluation)]}]
    example = USE.format(size=data.size, channels=data.channels)
    if isinstance(codec, Sampled) or (isinstance(codec, Bounded) and not isinstance(codec, Codebooks)):
        example += "\nsamples = model.sample(16, seed=0)           # from the prior"
    count = parameters_of(codec) if isinstance(codec, nn.Module) else 0
    return f"""\
---
{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---

# {name}

A model of kind `{config.model.kind}` for images of {data.size} × {data.size} pixels and {data.channels} channel(s),
with {count:,} parameters: the averaged weights of step {step:,} of a training with vaescale. `config.json` has all
settings, and the metadata of `model.safetensors` the fingerprint of the training images.

```python
{example}
```

Pixels are uint8, or floats in [0, 1]. The commands of vaescale take this folder as a run, too.

## Evaluation

{_measured(evaluation) if evaluation else "These weights have not been evaluated."}
"""


def _tags(config: Config, codec: Codec) -> list[str]:
    tags = [config.model.kind, "variational-autoencoder" if isinstance(codec, Bounded) else "autoencoder"]
    return [*tags, "image-tokenizer"] if isinstance(codec, Codebooks) else tags


def _result(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The numbers as a result of the Hub's model index, with the protocol of each as `args`."""
    images = {name: evaluation[name] for name in ("images", "size", "channels", "fingerprint")}
    protocol = evaluation["protocol"]
    metrics = []
    for name, words in tables.measured(evaluation).items():
        one = {"type": name, "name": words, "value": evaluation[name]}
        compared = [each for each in evaluation.get("comparisons", {}).values() if name in each["numbers"]]
        args = compared[0] if compared else {"protocol": protocol[name]} if name in protocol else {}
        metrics.append({**one, **({"args": args} if args else {})})
    return {
        "task": {"type": "image-to-image", "name": "reconstruction and generation"},
        "dataset": {"type": evaluation["data"], "name": evaluation["data"], "split": "val", "args": images},
        "metrics": metrics,
    }


def _measured(evaluation: dict[str, Any]) -> str:
    how = "\n".join(f"- {name}: {text}" for name, text in evaluation["protocol"].items() if name in evaluation)
    return f"```\n{tables.listing(evaluation)}\n```\n\n{how}"
