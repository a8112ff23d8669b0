"""The values of a new recipe, by what rows, model and machine are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from alignctl.init import choose, draft
from alignctl.init.draft import Draft
from alignctl.init.facts import Memory, Model, Rows, Wanted
from alignctl.init.rates import RATES
from alignctl.recipe.load import load
from alignctl.recipe.schema import METHODS
from alignctl.train.preflight import BANDS

GPU = Memory(24.0, "the GPU", gpu=True)
CPU = Memory(16.0, "this machine", gpu=False)
SMALL = Model(135_000_000, context=2048, template=True)
LARGE = Model(7_000_000_000, context=4096, template=False, kind="mistral")
ROWS = Rows(5000, "pairs", tuple(range(100, 700)))
WANTED = Wanted("dpo", "m", "rows.jsonl")


def choose_for(wanted: Wanted = WANTED, rows: Rows = ROWS, model: Model = SMALL, memory: Memory = GPU) -> Draft:
    return choose.draft(wanted, rows, model, memory, choose.chosen_adapter(wanted, model, memory))


def everything() -> Iterator[tuple[Wanted, Rows, Model, Memory]]:
    adapters, models = choose.ADAPTERS, (SMALL, LARGE, Model())
    few = Rows(30, "pairs", (5000,) * 30, counted=False)
    for method, adapter, model, memory, rows in product(METHODS, adapters, models, (GPU, CPU), (ROWS, few)):
        yield Wanted(method, "m", "rows.jsonl", adapter=adapter), rows, model, memory


def test_every_choice_is_a_recipe_with_a_learning_rate_that_has_worked_and_reasons(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    for wanted, rows, model, memory in everything():
        chosen, adapter = choose_for(wanted, rows, model, memory), choose.chosen_adapter(wanted, model, memory)
        file.write_text(draft.text(chosen, choose.head(wanted, adapter, file), []), encoding="utf-8")
        recipe = load(file, method=wanted.method).recipe
        low, high = BANDS[wanted.method, recipe.trains_adapter]
        assert low <= recipe.training.learning_rate <= high
        assert all(choice.why for section in chosen.values() for choice in section.values())


def test_rates_cover_every_size() -> None:
    assert RATES.keys() == BANDS.keys()
    for (method, adapter), sizes in RATES.items():
        assert [limit for limit, _ in sizes] == sorted({limit for limit, _ in sizes}) and sizes[-1][0] == float("inf")
        for _, rate in sizes:
            low, high = BANDS[method, adapter]
            assert low <= rate.learning_rate <= high and rate.why
            assert (rate.beta is None) == (method == "sft")


@pytest.mark.parametrize(
    ("model", "memory", "adapter"),
    [
        (SMALL, GPU, "lora"),
        (LARGE, GPU, "qlora"),  # 13.0 of 24 GiB
        (LARGE, Memory(80.0, "the GPU", gpu=True), "lora"),
        (Model(2_780_000_000), GPU, "lora"),  # 5.2 of 24 GiB
        (Model(2_780_000_000), Memory(8.0, "the GPU", gpu=True), "qlora"),
        (Model(), GPU, "qlora"),
    ],
)
def test_4_bits_where_the_weights_are_large_against_the_memory(model: Model, memory: Memory, adapter: str) -> None:
    chosen = choose_for(model=model, memory=memory)
    assert choose.chosen_adapter(WANTED, model, memory).value == adapter
    assert ("quantization" in chosen) == (adapter == "qlora") and "lora" in chosen


def test_all_weights_when_asked_for() -> None:
    chosen = choose_for(Wanted("dpo", "m", "d", adapter="full"))
    assert "lora" not in chosen and "quantization" not in chosen
    assert chosen["training"]["learning_rate"].value == 1e-6 and chosen["dpo"]["beta"].value == 0.5


def test_a_paged_optimizer_needs_a_gpu() -> None:
    assert choose_for(model=LARGE)["training"]["optim"].value == "paged_adamw_8bit"
    assert "optim" not in choose_for(model=LARGE, memory=CPU)["training"]


@pytest.mark.parametrize(
    ("model", "template"),
    [
        (Model(template=True), "model"),
        (Model(template=None), "model"),
        (Model(template=False, kind="phi"), "instruct"),
        (Model(template=False, kind="qwen2", knows_chatml=True), "chatml"),
        (Model(template=False, kind="mistral"), "zephyr"),
    ],
)
def test_a_template_is_named_where_the_tokenizer_has_none(model: Model, template: str) -> None:
    assert choose.template(WANTED, model).value == template
    assert choose.template(Wanted("dpo", "m", "d", template="alpaca"), model).value == "alpaca"


@pytest.mark.parametrize(
    ("tokens", "context", "length"),
    [
        (tuple(range(1, 1001)), 4096, 1024),  # p99 is 991
        ((10,) * 100, None, 64),
        ((100,) * 94 + (3000,) * 6, 4096, 3008),  # the 95th percentile, too, is long
        ((100,) * 970 + (9000,) * 30, 4096, 128),  # three in a hundred are not worth it
        ((3000,) * 100, 2048, 2048),
    ],
)
def test_length(tokens: tuple[int, ...], context: int | None, length: int) -> None:
    rows = Rows(len(tokens), "pairs", tokens)
    assert choose.max_length(rows, Model(context=context)).value == length


def test_a_share_that_is_too_long_may_be_dropped() -> None:
    assert "max_dropped" not in choose_for()["data"]
    rows = Rows(1000, "pairs", (100,) * 800 + (5000,) * 200)
    data = choose_for(rows=rows, model=SMALL)["data"]
    assert data["max_length"].value == 2048 and data["max_dropped"].value == pytest.approx(0.23)


def test_guessed_lengths_say_so() -> None:
    rows = Rows(100, "pairs", (50,) * 100, counted=False)
    assert "guessed from their characters" in choose_for(rows=rows)["data"]["max_length"].why


@pytest.mark.parametrize(("count", "update"), [(20, 4), (100, 8), (5000, 16)])
@pytest.mark.parametrize(("tokens", "batch"), [(500, 4), (1500, 2), (4000, 1)])
def test_batch_and_accumulation(count: int, update: int, tokens: int, batch: int) -> None:
    training = choose_for(rows=Rows(count, "pairs", (tokens,) * 10), model=LARGE)["training"]
    size, steps = (training[key].value for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    assert (size, size * steps) == (batch, update)


@pytest.mark.parametrize(("count", "fraction"), [(50, 0.2), (200, 0.1), (5000, 0.05)])
def test_rows_are_held_out(count: int, fraction: float) -> None:
    rows = Rows(count, "pairs", (100,) * 10)
    assert choose_for(rows=rows)["data"]["eval_fraction"].value == fraction


def test_held_out_rows_that_are_named() -> None:
    data = choose_for(Wanted("dpo", "m", "a/b", split="train_prefs", eval_data="a/b", eval_split="test_prefs"))["data"]
    assert data["train"].value == [{"path": "a/b", "split": "train_prefs"}]
    assert data["eval"].value == [{"path": "a/b", "split": "test_prefs"}] and "eval_fraction" not in data
    local = choose_for(Wanted("dpo", "m", "d.jsonl", eval_data="e.jsonl"))["data"]
    assert local["eval"].value == [{"path": "e.jsonl"}]


def test_sft_on_a_preference_set() -> None:
    rows = Rows(10, "pairs", (100,) * 10, answer="chosen")
    assert choose_for(Wanted("sft", "m", "d.jsonl"), rows)["data"]["train"].value[0]["answer"] == "chosen"


def test_revision_is_pinned() -> None:
    assert choose_for(model=Model(1, commit="c0ffee"))["model"]["revision"].value == "c0ffee"
    assert "revision" not in choose_for()["model"]
