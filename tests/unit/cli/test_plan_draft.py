"""What `edgekv plan` says of a draft: what it takes, what it costs in context, and how far it reaches."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgekv.cli.app import app
from edgekv.demo import draft_path, target_path
from edgekv.engine.kernel_needs import NotServedHere
from edgekv.errors import ModelError
from edgekv.model.hf_config import read_spec
from edgekv.text.same_vocabulary import VocabularyMismatch
from tests.model.other_tokens import copy_with_other_tokens
from tests.unit.cli.shapes import LLAMA_3_8B, write_shape

MIB, GIB = 1 << 20, 1 << 30
SMALL = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip

run = CliRunner().invoke


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_shape(tmp_path / "llama", LLAMA_3_8B)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_shape(tmp_path / "small", LLAMA_3_8B | SMALL)


def told(*arguments: object) -> str:
    return run(app, ["plan", *map(str, arguments)]).stdout


def planned(*arguments: object) -> dict[str, Any]:
    result = run(app, ["plan", *map(str, arguments), "--json"])
    assert result.exit_code in (0, 1), result.output
    return dict(json.loads(result.stdout))


def test_a_draft_on_a_full_card_costs_tokens_of_the_target(llama: Path, small: Path) -> None:
    card = ("--vram", "24GiB")
    alone, plan = planned(llama, *card), planned(llama, *card, "--draft", small)
    draft, leases = plan["draft"], plan["leases"]
    assert alone["draft"] is None
    assert (draft["method"], draft["tokens"], draft["architecture"]) == ("model", 8, "LlamaForCausalLM")
    assert (leases["weights.draft"], leases["kv.draft"]) == (draft["weight_bytes"], draft["kv"]["pool_bytes"])
    own = sum(leases[name] for name in ("weights.draft", "workspace.draft", "kv.draft"))
    grown = leases["workspace"] + leases["graphs"] - alone["leases"]["workspace"] - alone["leases"]["graphs"]
    assert (draft["num_bytes"], draft["verify_bytes"]) == (own + grown, grown)
    assert draft["cost_tokens"] == alone["kv"]["pool_tokens"] - plan["kv"]["pool_tokens"] > 20_000
    size = f"{draft['num_bytes'] / GIB:.2f} GiB"
    cost = f"{draft['cost_tokens']:,} fewer tokens of context ({alone['kv']['pool_tokens']:,} without it)"
    lines = told(llama, *card, "--draft", small).splitlines()
    line = next(line for line in lines if line.startswith("the draft takes "))
    assert line.startswith(f"the draft takes {size}")
    assert line.endswith(f": {cost}")


def test_a_draft_beside_a_pool_that_memory_does_not_limit_costs_nothing() -> None:
    for model in ("demo", target_path()):
        text = told(model, "--device", "cpu", "--draft", "demo", "--draft-kv", "10MiB")
        [line] = [line for line in text.splitlines() if line.startswith("the draft takes ")]
        assert line.endswith(": the KV pool is no smaller for it")
        assert "MiB" in line
        assert " to verify what is proposed (logits) among it: " in line
    plan = planned("demo", "--device", "cpu", "--draft", "demo", "--draft-kv", "10MiB")
    kv = plan["draft"]["kv"]
    assert (plan["draft"]["cost_tokens"], kv["pool_bytes"] // kv["block_bytes"]) == (0, 10 * MIB // kv["block_bytes"])


def test_the_demo_model_is_planned_with_its_draft_as_it_is_served() -> None:
    assert planned("demo", "--device", "cpu")["draft"]["context_tokens"] == 4096
    assert planned("demo", "--device", "cpu", "--draft", "off")["draft"] is None
    assert planned(target_path(), "--device", "cpu")["draft"] is None


def test_who_drafts_and_how_much_its_pool_holds(llama: Path, small: Path) -> None:
    lines = told(llama, "--vram", "24GiB", "--draft", small, "--draft-tokens", "1").splitlines()
    who = "draft: LlamaForCausalLM, 1,235.8 M parameters, in bfloat16"
    assert f"{who}; proposes up to 1 token for a sequence at once" in lines
    pool = planned(llama, "--vram", "24GiB", "--draft", small)["draft"]["kv"]["pool_tokens"]
    holds = f"its pool holds {pool:,} tokens ({pool / 8192:.2f}x 8,192): those of the sequences that decode; "
    assert any(line.startswith(holds) for line in lines)
    assert not any("its own context ends" in line for line in lines)


def test_where_the_drafts_own_context_ends_so_does_speculation(llama: Path, tmp_path: Path) -> None:
    short = write_shape(tmp_path / "short", LLAMA_3_8B | SMALL | {"max_position_embeddings": 2048})
    ends = "its own context ends at 2,048 tokens, the model's at 8,192: in a longer sequence nothing more is proposed"
    assert ends in told(llama, "--vram", "24GiB", "--draft", short).splitlines()
    text = told(llama, "--vram", "24GiB", "--draft", short, "--context", "2048")
    assert "its own context ends" not in text
    assert "x 2,048): those of the sequences" in text


def test_a_drafts_longer_context_costs_nothing(llama: Path, small: Path, tmp_path: Path) -> None:
    long = write_shape(tmp_path / "long", LLAMA_3_8B | SMALL | {"max_position_embeddings": 131_072})
    for where in (("--vram", "24GiB"), ("--device", "cpu", "--draft-kv", "1GiB")):
        plan, same = (planned(llama, *where, "--draft", draft)["draft"] for draft in (long, small))
        assert (plan["workspace_bytes"], plan["kv"]) == (same["workspace_bytes"], same["kv"])


def test_n_grams_take_no_memory_but_for_logits() -> None:
    here = (target_path(), "--device", "cpu", "--draft", "ngram")
    lines = told(*here).splitlines()
    assert "n-grams propose up to 8 tokens for a sequence at once, as they followed earlier in its text" in lines
    plan, alone = planned(*here), planned(*here[:-1], "off")
    grown = plan["leases"]["workspace"] - alone["leases"]["workspace"]
    vocab = read_spec(target_path()).vocab_size
    assert grown >= 16 * vocab * 4, "a token of each of 16 sequences, in float32"
    assert plan["draft"] == {
        "method": "ngram", "tokens": 8, "num_bytes": grown, "verify_bytes": grown, "cost_tokens": 0,
    }  # fmt: skip
    assert plan["leases"].keys() == alone["leases"].keys()
    [line] = [line for line in lines if line.startswith("they take no device memory but ")]
    assert line.endswith(" to verify what is proposed (logits): the KV pool is no smaller for it")


def test_a_configurations_draft_is_planned_and_options_go_over_it(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"models: {{m: {{path: {target_path()}, device: cpu, "
        f"draft: {{path: {draft_path()}, tokens: 5, kv: {{budget: 4MiB}}}}}}}}\n"
    )
    draft = planned(file)["draft"]
    assert (draft["tokens"], draft["kv"]["pool_bytes"]) == (5, 4 * MIB)
    draft = planned(file, "--draft-tokens", "3", "--draft-kv", "2MiB")["draft"]
    assert (draft["tokens"], draft["kv"]["pool_bytes"]) == (3, 2 * MIB)
    draft = planned(file, "--draft", "ngram")["draft"]
    assert (draft["method"], draft["tokens"]) == ("ngram", 5)
    assert planned(file, "--draft", "off")["draft"] is None


def test_a_drafts_share_of_memory_is_of_what_is_free(llama: Path, small: Path) -> None:
    kv = planned(llama, "--vram", "24GiB", "--draft", small, "--draft-kv", "5%")["draft"]["kv"]
    assert kv["pool_bytes"] <= 24 * GIB * 0.05 < kv["pool_bytes"] + kv["block_bytes"]


def test_a_draft_without_weights_is_planned_as_its_configuration_describes_it(llama: Path, small: Path) -> None:
    text = told(llama, "--vram", "24GiB", "--draft", small)
    assert f"no weights: {small} holds none that could be loaded" in text
    assert planned(llama, "--vram", "24GiB", "--draft", small)["draft"]["checkpoint"]["is_assumed"]


def test_how_fast_a_token_can_be_is_told_without_proposals(llama: Path, small: Path) -> None:
    def speed(*options: object) -> str:
        text = told(llama, "--card", "7900xtx", *options)
        return next(line for line in text.splitlines() if line.startswith("decode, one request"))

    assert speed("--draft", small).startswith("decode, one request, without proposals: at most ")
    assert speed().startswith("decode, one request: at most ")


def test_a_draft_that_leaves_no_room_can_be_left_out(llama: Path, small: Path) -> None:
    plan = planned(llama, "--vram", "18GiB", "--draft", small)
    assert not plan["fits"]
    [off] = [made for made in plan["remedies"] if made["options"] == "--draft off"]
    assert off["fits"]
    alone = planned(llama, "--vram", "18GiB", "--draft", "off")
    assert alone["fits"]
    assert f"the pool would hold {alone['kv']['pool_tokens']:,} tokens: it fits then" in off["brings"]
    text = told(llama, "--vram", "18GiB", "--draft", small)
    assert " ✓ --draft off: without the draft, " in text
    assert "its pool holds" not in text, "there is none"


def remedy(plan: dict[str, Any], option: str) -> dict[str, Any]:
    [found] = [made for made in plan["remedies"] if made["options"].split()[:1] == [option]]
    return dict(found)


def test_a_drafts_pool_that_is_too_large_can_be_smaller(llama: Path, small: Path) -> None:
    for asked in (("--draft-kv", "100GiB"), ("--draft-kv", "3GiB", "--kv-budget", "4GiB")):
        card = (llama, "--vram", "24GiB", "--draft", small)
        plan = planned(*card, *asked)
        assert not plan["fits"]
        made = remedy(plan, "--draft-kv")
        option, size = made["options"].split()
        fitting = planned(*card, *asked[2:], option, size)
        assert made["fits"]
        assert fitting["fits"]
        draft = f"{fitting['draft']['kv']['pool_tokens']:,} tokens of the draft"
        assert made["brings"] == f"{draft}; the pool would hold {fitting['kv']['pool_tokens']:,} tokens: it fits then"
        own = planned(*card)["draft"]["kv"]["pool_bytes"]
        assert fitting["draft"]["kv"]["pool_bytes"] <= own, "no more than it would have unless told"


def test_no_smaller_pool_of_a_draft_than_the_largest_that_fits_is_named(llama: Path, small: Path) -> None:
    # Beside this KV budget even the draft's own choice would be too much.
    card = (llama, "--vram", "24GiB", "--draft", small, "--kv-budget", "3600MiB")
    made = remedy(planned(*card), "--draft-kv")
    mib = int(made["options"].removeprefix("--draft-kv ").removesuffix("MiB"))
    assert planned(*card, "--draft-kv", f"{mib}MiB")["fits"]
    assert not planned(*card, "--draft-kv", f"{mib + 1}MiB")["fits"]
    alone = planned(llama, "--vram", "16GiB", "--draft", small)
    assert not [made for made in alone["remedies"] if made["options"].startswith("--draft-kv")], "it would not help"


def test_without_room_for_any_pool_nothing_is_said_of_a_smaller_one() -> None:
    text = told("demo", "--vram", "600MiB")
    [line] = [line for line in text.splitlines() if line.startswith("the draft takes ")]
    assert line.endswith(": without it there would be no room for a KV pool either")


def test_a_change_that_makes_it_worse_is_no_remedy() -> None:
    plan, quantised = planned("demo", "--vram", "600MiB"), planned("demo", "--vram", "600MiB", "--weights", "int8")
    assert quantised["weight_bytes"] < plan["weight_bytes"]
    assert quantised["missing_bytes"] > plan["missing_bytes"], "products with them need more memory than they save"
    assert not [made for made in plan["remedies"] if "--weights" in made["options"]]
    assert remedy(plan, "--draft")["brings"].startswith("without the draft, ")
    short = ("demo", "--vram", "1140MiB", "--draft", "off")
    plan, quantised = planned(*short), planned(*short, "--weights", "int8")
    assert 0 < quantised["kv"]["pool_tokens"] < plan["kv"]["pool_tokens"] < 4096
    assert not [made for made in plan["remedies"] if "--weights" in made["options"]]


def test_a_change_that_leaves_as_much_missing_is_no_remedy() -> None:
    short = ("demo", "--vram", "16GiB", "--kv-budget", "20GiB", "--draft", "off")
    plan, smaller = planned(*short), planned(*short, "--kv-dtype", "int8")
    assert plan["free_bytes"] < smaller["free_bytes"] < plan["free_bytes"] + MIB, "smaller blocks fill it less well"
    assert not [made for made in plan["remedies"] if "--kv-dtype" in made["options"]]
    assert remedy(plan, "--kv-budget")["fits"]


def test_what_quantised_weights_take_for_a_step_is_told_where_it_counts() -> None:
    short = ("demo", "--vram", "1125MiB", "--dtype", "float32", "--draft", "off")
    plan, quantised = planned(*short), planned(*short, "--weights", "int4")
    less = (plan["weight_bytes"] - quantised["weight_bytes"]) / MIB
    more = (quantised["workspace_bytes"] - plan["workspace_bytes"]) / MIB
    assert more > 0
    brings = f"{less:.2f} MiB less for the weights, {more:.2f} MiB more for a step; "
    assert brings in next(made["brings"] for made in plan["remedies"] if made["options"] == "--weights int4")


def test_what_serve_would_not_take_for_a_draft_is_not_planned(tmp_path: Path) -> None:
    other = copy_with_other_tokens(draft_path(), tmp_path / "other")
    refused = run(app, ["plan", "demo", "--draft", str(other)])
    assert isinstance(refused.exception, VocabularyMismatch)


def test_what_cannot_draft_is_told(tmp_path: Path) -> None:
    nowhere = run(app, ["plan", "demo", "--draft", str(tmp_path / "absent")])
    assert isinstance(nowhere.exception, ModelError)
    assert str(nowhere.exception).startswith(f"--draft {tmp_path / 'absent'}: no such folder; ")
    file = tmp_path / "c.yaml"
    file.write_text(
        f"models: {{m: {{path: {target_path()}, device: cpu, draft: {{path: {draft_path()}, kv: {{dtype: fp8}}}}}}}}\n"
    )
    refused = run(app, ["plan", str(file)])
    assert isinstance(refused.exception, NotServedHere)
    assert str(refused.exception) == (
        "draft.kv.dtype: fp8 needs a card's kernels, but this model runs on the CPU. Set draft.kv.dtype to int8; or "
        "set draft.kv.dtype to auto"
    )
