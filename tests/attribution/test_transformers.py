"""Hugging Face models, their code untouched: the bill is complete, and nothing takes a pass per example."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kxexplain as kx
from kxexplain.gradients import DiscreteGradient, layout_of, output_gradients, trainable
from kxexplain.gradients.capture import Capture
from kxexplain.trajectory.batches import call, count
from tests import reference
from tests.cases import CLASSES, Pairs, Problem
from tests.gradients.test_capture import written_out
from tests.gradients.test_discrete import EVERY, captures, moved, moving
from tests.laws import FACTORED, assert_close, assert_complete
from tests.runs import run

transformers = pytest.importorskip("transformers", reason="comes with the test extra")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers", "ignore::FutureWarning:transformers")


class Classifier(nn.Module):
    """Logits from an encoder's first word, or a decoder's last."""

    def __init__(self, body: nn.Module, last: bool) -> None:
        super().__init__()
        self.body, self.last, self.head = body, last, nn.Linear(16, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden[:, -1] if self.last else hidden[:, 0])


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    return Classifier(transformers.BertModel(config, add_pooling_layer=False), last=False)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=12, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return Classifier(transformers.GPT2Model(config), last=True)


MAKERS: dict[str, tuple[Callable[[], nn.Module], str]] = {"bert": (bert, "encoder.layer.1."), "gpt2": (gpt2, "h.1.")}


def sentences(count: int, right: bool) -> list[dict[str, Tensor]]:
    """Words and their mask; padding on the right, or on the left for models that read on."""
    made = []
    for length in torch.randint(3, 8, (count,)).tolist():
        mask = torch.zeros(7, dtype=torch.long)
        mask[slice(0, length) if right else slice(7 - length, 7)] = 1
        made.append({"input_ids": torch.randint(2, 30, (7,)) * mask, "attention_mask": mask})
    return made


def problem_of(name: str, dtype: torch.dtype, frozen: bool = True) -> Problem:
    """Only the head and the last block are trained, as is usual."""
    make, block = MAKERS[name]
    model = make().to(dtype)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or key.startswith(f"body.{block}") or key.startswith("head"))
    data, queries = (Pairs(sentences(n, name == "bert"), torch.randint(CLASSES, (n,))) for n in (9, 3))
    return Problem(model, data, queries, "cross_entropy")


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(MAKERS))
def test_fine_tuned_with_adamw(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Under dropout, which replay draws again."""
    problem = problem_of(name, dtype)
    free = [p for p in problem.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(free, lr=0.01, weight_decay=0.1)
    trajectory = run(problem, tmp_path, optimizer=optimizer, batches=[[0, 1, 2, 3], [4, 5, 6], [7, 8]])
    found = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all", kernel=False)
    assert_complete(found, 1e-10 if dtype == torch.float64 else 1e-5)
    assert float(found.contributions.norm()) > 0


@pytest.mark.parametrize("frozen", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(MAKERS))
def test_one_pass_for_all_examples(name: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(name, torch.float64, frozen)
    model, inputs = problem.model.eval(), problem.inputs
    parameters = trainable(model)
    layout = layout_of(model, inputs, parameters)
    capture = Capture(parameters, layout, count(inputs))
    with capture:
        call(model, inputs)
    assert not layout.blind
    assert not layout.loose | capture.loose
    _, factors = output_gradients(model, inputs, layout)
    assert_close(written_out(factors, model), reference.jacobian(model, inputs), FACTORED[torch.float64])

    made = captures(monkeypatch)
    monkeypatch.setattr(DiscreteGradient, "_at_midpoint", lambda *_: pytest.fail("not followed"))
    start = {key: value for key, value in moving(model).items() if key in parameters}
    discrete = DiscreteGradient(model, list(start))
    end = moved(start, 0.1, model)
    found = discrete(start, end, inputs, EVERY)
    assert not made[-1].loose
    assert not discrete.one_by_one
    assert_close(found.along({k: end[k] - start[k] for k in start}), found.end - found.start, 1e-11)
