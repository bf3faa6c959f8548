"""What fine-tunes on the Hub look like, and what `check` makes of it: names, cards, chains, files, references."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from drawn_data import card
from huggingface_hub import HfApi, constants, snapshot_download
from safetensors.torch import load_file, save
from stand_ins import BERT, CLIP, VIT, Tensors, as_json, bot_pull_request, publish, weights
from starlette.responses import JSONResponse
from transformers import BertConfig, BertForSequenceClassification, CLIPVisionModel

from hf_soup import IncompatibleError, LineageReport, Recipe, ResolveError, check, cook
from hf_soup.hub import resolve
from hf_soup.local_hub import LocalHub
from hf_soup.local_hub.wire import Record

Put = Callable[..., str]
FEATHERS = ["connectivity/feather_berts_0", "connectivity/feather_berts_1"]
TOWERS = [f"tanganke/clip-vit-base-patch32_{task}" for task in ("mnist", "svhn", "dtd")]
EMOTION = "distilbert-base-uncased-finetuned-emotion"
NAMED = {"id2label": {"0": "negative", "1": "positive"}, "label2id": {"negative": 0, "positive": 1}}


@pytest.fixture
def local_hub(zoo: LocalHub) -> LocalHub:
    """The Hub of the whole session: what a test publishes, it publishes under a name of its own."""
    zoo.store.count_downloads(
        zoo.store.repos["model", BERT], 1000
    )  # as a base has, so that it is among those that are looked at
    return zoo


@pytest.fixture(scope="module")
def bert(zoo: LocalHub) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors of a classifier whose body is that of the zoo's BERT, for two labels."""
    config = stand_ins.bert_config(architectures=["BertForSequenceClassification"])
    values, tensors = stand_ins.saved(stand_ins.built(BertForSequenceClassification, config))
    return {**values, **NAMED}, tensors | stand_ins.bert_body()


@pytest.fixture
def put(online: LocalHub, bert: tuple[dict[str, Any], Tensors], request: pytest.FixtureRequest) -> Put:
    """Publishes a fine-tune of the zoo's BERT under the test's own name, and returns its id; None leaves out."""
    owner = re.sub(r"\W+", "-", request.node.name)[:40].strip("-")

    def published(
        name: str, seed: int = 1, *, tensors: Tensors | None = None, base: object = BERT,
        config: dict[str, Any] | None = None,
    ) -> str:  # fmt: skip
        found = {"config.json": as_json({**bert[0], **(config or {})})}
        found |= weights(stand_ins.nearby(bert[1], seed) if tensors is None else tensors)
        found["README.md"] = card(license="apache-2.0", **({} if base is None else {"base_model": base}))
        publish(online, f"{owner}/{name}", found)
        return f"{owner}/{name}"

    return published


def codes(lineage: LineageReport) -> set[str]:
    """The codes of what was found, without the tokenizer that these models lack."""
    return {reason.code for reason in lineage.reasons} - {"processing-absent"}


def said(lineage: LineageReport, code: str) -> str:
    return next(reason.message for reason in lineage.reasons if reason.code == code)


def ancestor(lineage: LineageReport) -> tuple[str, str] | None:
    return (lineage.ancestor.model, lineage.ancestor.source) if lineage.ancestor else None


# ---- who comes from whom --------------------------------------------------------------------------------------


def test_one_base_under_its_old_and_its_new_name(put: Put) -> None:
    """And that base has the tensor names of 2018, and a head for other things."""
    lineage = check([put("a", 1, base="bert-base-uncased"), put("b", 2, base=BERT), put("c", 3, base=[BERT])])
    assert (lineage.verdict, codes(lineage)) == ("proven", set())
    assert ancestor(lineage) == (BERT, "card")
    assert lineage.ancestor is not None
    assert re.fullmatch("[0-9a-f]{40}", lineage.ancestor.revision or "")


def test_a_base_that_the_user_names_by_its_old_name(put: Put) -> None:
    lineage = check([put("a", 1, base=None), put("b", 2, base=BERT)], base="bert-base-uncased")
    assert (lineage.verdict, codes(lineage), ancestor(lineage)) == ("proven", set(), (BERT, "recipe"))


def test_a_base_in_a_folder_is_the_one_on_the_hub_that_the_cards_name(put: Put, tmp_path: Path) -> None:
    """By its weights; another one is said to be another."""
    folder = snapshot_download(BERT, local_dir=tmp_path / "bert")
    models = [put("a", 1), put("b", 2)]
    lineage = check(models, base=folder)
    assert (lineage.verdict, codes(lineage), ancestor(lineage)) == ("proven", set(), ("local:bert", "recipe"))
    other = put("other", 9, base=None)
    assert codes(check(models, base=snapshot_download(other, local_dir=tmp_path / "other"))) == {"base-contradicted"}


def strange(put: Put, bert: tuple[dict[str, Any], Tensors], name: str) -> str:
    """A model of the same architecture that began from other random numbers."""
    built = stand_ins.built(BertForSequenceClassification, BertConfig(**{**bert[0], "num_labels": 2}), seed=7)
    return put(name, tensors=stand_ins.saved(built)[1], base=None)


def test_cards_that_name_different_bases(put: Put) -> None:
    """The weights of both are kin to both, as they are where ancestors share nothing but their random numbers."""
    other = put("other", 9, base=None)
    models = [put("a", 1), put("b", 2, base=other)]
    lineage = check(models)
    assert (lineage.verdict, codes(lineage)) == ("refused", {"bases-differ"})
    assert f"{models[0]} from {BERT} (cosine 0.99" in said(lineage, "bases-differ")
    assert f"{models[1]} from {other} (cosine 0.99" in said(lineage, "bases-differ")
    assert "--base" in said(lineage, "bases-differ")
    settled = check(models, base=BERT)
    assert (settled.verdict, codes(settled)) == ("likely", {"base-contradicted"})


@pytest.mark.parametrize("wrong", [VIT, None])
def test_one_whose_card_the_weights_contradict(
    put: Put, bert: tuple[dict[str, Any], Tensors], wrong: str | None
) -> None:
    wrong = wrong or strange(put, bert, "wrong")
    models = [put("a", 1), put("b", 2, base=wrong), put("c", 3)]
    lineage = check(models)
    assert (lineage.verdict, codes(lineage)) == ("likely", {"card-wrong"})
    assert ancestor(lineage) == (BERT, "card")
    message = said(lineage, "card-wrong")
    assert f"{models[1]} says to come from {wrong}, but the weights have nothing in common with it (" in message


def test_a_base_under_two_names(put: Put, bert: tuple[dict[str, Any], Tensors]) -> None:
    mirror = put("mirror", tensors=bert[1], base=None)
    copy = put("copy", tensors=bert[1], base=None)
    lineage = check([put("a", 1, base=mirror), put("b", 2, base=copy)])
    assert (lineage.verdict, codes(lineage)) == ("proven", {"base-copied"})
    assert ancestor(lineage) == (mirror, "card")


def test_cards_that_all_name_the_wrong_base_are_found_out(put: Put, bert: tuple[dict[str, Any], Tensors]) -> None:
    wrong = strange(put, bert, "wrong")
    lineage = check([put("a", 1, base=wrong), put("b", 2, base=wrong)])
    assert (lineage.verdict, codes(lineage)) == ("likely", {"card-wrong", "base-inferred"})
    assert ancestor(lineage) == (BERT, "weights")
    assert f"say to come from {wrong}, but the weights have nothing in common with it (" in said(lineage, "card-wrong")
    named = [put("c", 1, base=wrong), put("d", 2, base=wrong)]
    assert check(named, base=BERT).verdict == "likely"
    found = check(named, base=wrong)
    assert (found.verdict, codes(found)) == ("refused", {"base-wrong"})
    assert f"{wrong} is not their base" in said(found, "base-wrong")


def test_a_fine_tune_of_a_fine_tune(put: Put) -> None:
    middle = put("middle", 4)
    lineage = check([put("a", 1), put("b", 2, base=middle)])
    assert (lineage.verdict, codes(lineage), ancestor(lineage)) == ("proven", set(), (BERT, "card"))


def test_a_fine_tune_of_an_adapter(put: Put, online: LocalHub) -> None:
    """The adapter's config says what it is for."""
    owner = put("a", 1).split("/")[0]
    adapter = {"adapter_config.json": as_json({"base_model_name_or_path": BERT}), "adapter_model.safetensors": b"x"}
    publish(online, f"{owner}/adapter", {**adapter, "README.md": card(license="mit")})
    lineage = check([f"{owner}/a", put("b", 2, base=f"{owner}/adapter")])
    assert (lineage.verdict, codes(lineage), ancestor(lineage)) == ("proven", set(), (BERT, "card"))


def test_an_ingredient_that_is_the_ancestor_of_another(put: Put) -> None:
    first = put("first", 4, base=None)
    lineage = check([first, put("second", 5, base=first)])
    assert (lineage.verdict, codes(lineage), ancestor(lineage)) == ("proven", {"identical"}, (first, "card"))
    assert f"{first}: the body is equal to {first}'s" in said(lineage, "identical")
    both = [put("third", 4), put("fourth", 5, base=put("fifth", 6))]
    assert check(both, base=both[0]).verdict == "likely"  # the fourth says something else
    assert "third says" not in said(check(both, base=both[0]), "base-contradicted")


def test_chains_that_loop(put: Put) -> None:
    owner = put("a", 1, base=None, config={"_name_or_path": "x"}).split("/")[0]
    put("a", 1, base=f"{owner}/b")
    models = [f"{owner}/a", put("b", 2, base=f"{owner}/a")]
    assert check(models).verdict in ("proven", "likely")
    alone = [put("c", 1, base=None, config={"_name_or_path": f"{owner}/c"}), put("d", 2, base=f"{owner}/d")]
    lineage = check(alone)
    assert (lineage.verdict, codes(lineage)) == ("likely", {"base-inferred"})


def test_cards_that_name_each_other(put: Put) -> None:
    owner = put("a", 1, base=None).split("/")[0]
    models = [put("a", 1, base=f"{owner}/b"), put("b", 2, base=f"{owner}/a")]
    lineage = check(models)
    assert lineage.verdict == "likely"
    assert codes(lineage) <= {"base-inferred", "base-unknown"}  # who came first, nobody says
    among = [put("c", 3, base=models[0]), put("d", 4, base=models[1])]
    assert check(among).verdict == "proven"  # for these it does not matter


def test_bases_are_followed_three_steps(put: Put) -> None:
    """What is further is unknown, and contradicts nobody."""
    owner = put("g0", 1).split("/")[0]
    for generation in range(1, 4):
        put(f"g{generation}", generation, base=f"{owner}/g{generation - 1}")
    other = put("other", 9)
    near = check([f"{owner}/g2", other])
    assert (near.verdict, codes(near), ancestor(near)) == ("proven", set(), (BERT, "card"))
    far = check([f"{owner}/g3", other])
    assert (far.verdict, codes(far), ancestor(far)) == ("likely", {"base-unknown"}, None)
    assert "no base in common that is at most three steps back" in said(far, "base-unknown")
    named = check([f"{owner}/g3", other], base=BERT)
    assert (named.verdict, codes(named)) == ("proven", set())


def test_cards_may_not_ask_for_a_thousand_requests(put: Put, online: LocalHub) -> None:
    fan = [put(f"f{n}", n, base=[f"gone/{n}-{each}" for each in range(40)]) for n in range(10)]
    first = len(online.requests)
    model = put("top", 1, base=fan)
    check([model, put("b", 2)])
    looked = {record.path for record in online.requests[first:] if "/gone/" in record.path}
    assert len(looked) <= 64


def test_an_address_on_a_card(put: Put) -> None:
    lineage = check([put("a", 1, base=f"https://huggingface.co/{BERT}"), put("b", 2)])
    assert (lineage.verdict, codes(lineage)) == ("proven", set())


def test_a_candidate_may_hold_numbers_that_are_none(put: Put, online: LocalHub, bert: Any) -> None:
    """Nobody named it, so nothing is said about it, and no arithmetic complains."""
    tensors = {name: each * float("inf") for name, each in bert[1].items()}
    # Without the ingredients' labels, which an ancestor has not learned.
    broken = put("broken", tensors=tensors, base=None, config={"id2label": None, "label2id": None})
    online.store.count_downloads(online.store.repos["model", broken], 2000)
    lineage = check([put("a", 1, base=None), put("b", 2, base=None)])
    assert (lineage.verdict, codes(lineage), ancestor(lineage)) == ("likely", {"base-inferred"}, (BERT, "weights"))


@pytest.mark.usefixtures("short_pauses")
def test_samples_of_others_may_fail(put: Put, online: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an ancestor, and of a candidate that nobody named; those of an ingredient may not."""
    models = [put("a", 1), put("b", 2)]
    mute = [put("c", 1, base=None), put("d", 2, base=None)]
    contents = {name: resolve(name).files["model.safetensors"].sha256 for name in (BERT, mute[0])}
    broken = {BERT}

    def answer(request: Any) -> Any:
        if request.headers.get("range", "bytes=0-").startswith("bytes=0-"):
            return None
        path = request.url.path
        return JSONResponse({}, 403) if any(name in path or str(contents[name]) in path for name in broken) else None

    monkeypatch.setattr(online, "intercept", answer)
    lineage = check(models)
    assert (lineage.verdict, codes(lineage)) == ("likely", {"base-unreadable"})
    assert ancestor(check(mute)) != (BERT, "weights")
    broken.add(mute[0])
    with pytest.raises(ResolveError, match=mute[0]):
        check(mute)


def test_a_folder_in_name_or_path_is_no_ancestor(put: Put, tmp_path: Path) -> None:
    """Not even where its name could be a repo's, or is that of a folder here."""
    (tmp_path / "bert-finetuned").mkdir()
    paths = ["/home/me/bert", "bert-finetuned", "results/run 1", "out/checkpoint-9", ""]
    models = [put(f"m{n}", n, base=None, config={"_name_or_path": path}) for n, path in enumerate(paths)]
    lineage = check(models)
    assert (lineage.verdict, codes(lineage), ancestor(lineage)) == ("likely", {"base-inferred"}, (BERT, "weights"))
    with_card = check([*models, put("carded", 7)])
    assert (with_card.verdict, codes(with_card)) == ("likely", {"base-undeclared"})
    assert [reason.ingredients for reason in with_card.reasons if reason.code == "base-undeclared"] == [tuple(models)]
    assert check([*models, put("carded", 7)], base=BERT).verdict == "proven"


def test_a_base_on_a_card_is_never_a_folder_here(
    put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bert: tuple[dict[str, Any], Tensors]
) -> None:
    (tmp_path / "bert-base-uncased").mkdir()
    (tmp_path / "bert-base-uncased" / "config.json").write_bytes(as_json(bert[0]))
    (tmp_path / "bert-base-uncased" / "model.safetensors").write_bytes(save(bert[1], {"format": "pt"}))
    monkeypatch.chdir(tmp_path)
    models = [put("a", 1, base="bert-base-uncased"), put("b", 2, base="bert-base-uncased")]
    assert ancestor(check(models)) == (BERT, "card")
    assert ancestor(check(models, base="bert-base-uncased")) == ("local:bert-base-uncased", "recipe")


def test_only_configs_name_the_base(put: Put) -> None:
    one = {"base": None, "config": {"_name_or_path": "bert-base-uncased"}}
    lineage = check([put("a", 1, **one), put("b", 2, **one)])
    assert (lineage.verdict, codes(lineage), ancestor(lineage)) == ("proven", set(), (BERT, "card"))


def test_a_base_model_of_the_wrong_type(put: Put, online: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub refuses such cards today, and has older ones."""
    wrong: list[object] = [7, [], [None, 1], {"name": BERT}, "", "not an id", [[BERT]]]
    with monkeypatch.context() as patch:
        validated = "/api/validate-yaml"
        patch.setattr(online, "intercept", lambda request: JSONResponse({}) if request.url.path == validated else None)
        models = [put(f"m{n}", n, base=base) for n, base in enumerate(wrong)]
    lineage = check(models)
    assert (lineage.verdict, codes(lineage)) == ("likely", {"base-inferred"})


def test_no_card_anywhere(online: LocalHub, bert: tuple[dict[str, Any], Tensors]) -> None:
    for number in (1, 2):
        files = {"config.json": as_json(bert[0]), **weights(stand_ins.nearby(bert[1], number))}
        publish(online, f"cardless/{number}", files)
    lineage = check(["cardless/1", "cardless/2"])
    assert (lineage.verdict, codes(lineage), ancestor(lineage)) == ("likely", {"base-inferred"}, (BERT, "weights"))


def test_an_ancestor_that_is_gone(put: Put) -> None:
    lineage = check([put("a", 1, base="acme/gone"), put("b", 2, base="acme/gone")])
    assert (lineage.verdict, codes(lineage), ancestor(lineage)) == ("likely", {"base-inferred"}, (BERT, "weights"))
    assert "(acme/gone is not there)" in said(lineage, "base-inferred")
    with pytest.raises(ResolveError, match="The base cannot be used: 'acme/gone' does not exist"):
        check([put("c", 1), put("d", 2)], base="acme/gone")


def test_an_ancestor_that_is_gated(put: Put, online: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = put("gated", 9, base=None)
    HfApi().update_repo_settings(gated, gated="auto")
    monkeypatch.delenv("HF_TOKEN")
    lineage = check([put("a", 1, base=gated), put("b", 2, base=gated)], token=False)
    assert (lineage.verdict, codes(lineage)) == ("likely", {"base-unreadable"})
    assert "is gated" in said(lineage, "base-unreadable")
    assert lineage.ancestor is not None
    assert lineage.ancestor.model == gated


def test_an_ancestor_that_is_a_pickle(put: Put) -> None:
    lineage = check([put("a", 1, base=FEATHERS[0]), put("b", 2, base=FEATHERS[0])])
    assert (lineage.verdict, codes(lineage)) == ("likely", {"base-unreadable"})
    assert "only pytorch_model.bin" in said(lineage, "base-unreadable")


def test_one_model_by_its_commit_is_what_a_selection_kept(put: Put) -> None:
    model = put("a", 1)
    lineage = check([model])
    assert (lineage.verdict, codes(lineage)) == ("refused", {"single"})
    pinned = check([f"{model}@{lineage.models.checkpoints[0].revision}"])
    assert (pinned.verdict, codes(pinned)) == ("proven", {"single"})


def test_one_repo_by_two_names_counts_twice(put: Put) -> None:
    lineage = check(["bert-base-uncased", BERT])
    assert "identical" in codes(lineage)
    assert lineage.models.names == tuple(f"{BERT}@{lineage.models.checkpoints[0].revision[:7]}#{n}" for n in (1, 2))


# ---- where the weights are ------------------------------------------------------------------------------------


def test_weights_in_several_files_beside_one_in_a_single_file(online: LocalHub) -> None:
    lineage = check(["hanyp/vit-base-beans", "zqTensor/vit-base-beans"])
    assert (lineage.verdict, codes(lineage)) == ("proven", set())
    assert lineage.models.checkpoints[0].weights.files == (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    )


def test_weights_in_the_bots_pull_request(online: LocalHub) -> None:
    """Found, said, and pinned to the pull request's commit."""
    models = ["sanjeev498/vit-base-beans", "zqTensor/vit-base-beans"]
    lineage = check(models, base=VIT)
    assert (lineage.verdict, codes(lineage)) == ("proven", set())
    refs = HfApi(endpoint=online.endpoint, token=online.token).list_repo_refs(models[0], include_pull_requests=True)
    assert refs.pull_requests is not None
    (checkpoint, _) = lineage.models.checkpoints
    assert [checkpoint.revision] == [each.target_commit for each in refs.pull_requests]
    assert checkpoint.notes == ("its safetensors are in the conversion bot's pull request (refs/pr/1)",)
    named = check([f"{models[0]}@refs/pr/1", models[1]], base=VIT)
    assert named.models.checkpoints[0].revision == checkpoint.revision


def test_a_pull_request_that_is_not_to_be_believed(
    put: Put, online: LocalHub, bert: tuple[dict[str, Any], Tensors]
) -> None:
    content = weights(bert[1])
    for name, options in (
        ("author", {"author": "SFconvertb0t"}),
        ("title", {"title": "Adding safetensors"}),
        ("old", {}),
    ):
        files = {"config.json": as_json(bert[0]), **stand_ins.pickled(bert[1])}
        publish(online, f"unbelievable/{name}", files)
        bot_pull_request(online, f"unbelievable/{name}", content, **options)
    publish(online, "unbelievable/old", {"README.md": b"---\nlicense: mit\n---\n# The head of main has moved on\n"})
    for name in ("author", "title", "old"):
        with pytest.raises(ResolveError, match=r"only pytorch_model\.bin"):
            check([f"unbelievable/{name}", put(f"beside-{name}")])


def test_pickles_alone_are_refused_with_both_remedies(online: LocalHub) -> None:
    with pytest.raises(ResolveError) as caught:
        check(FEATHERS)
    assert "2 of 2 models cannot be used" in caught.value.message
    assert "spaces/safetensors/convert" in caught.value.hint
    assert "allow_pickle: true" in caught.value.hint


def test_pickles_are_read_when_that_is_allowed_and_converted_once(online: LocalHub, tmp_path: Path) -> None:
    lineage = check(FEATHERS, allow_pickle=True)
    assert (lineage.verdict, codes(lineage), ancestor(lineage)) == ("proven", set(), (BERT, "card"))
    assert lineage.models.checkpoints[0].notes == ("its weights were converted from pytorch_model.bin",)
    converted = sorted((tmp_path / "home" / "hf-soup" / "converted").rglob("*.safetensors"))
    assert len(converted) == 2
    times = [path.stat().st_mtime_ns for path in converted]
    asked = len(online.requests)
    soup = cook(Recipe(ingredients=FEATHERS, allow_pickle=True), tmp_path / "soup")
    assert [path.stat().st_mtime_ns for path in converted] == times
    assert not [each for each in weight_requests(online, asked) if FEATHERS[0] in each.path]
    a, b = (load_file(path) for path in converted)
    name = "bert.encoder.layer.1.output.dense.weight"
    mean = ((a[name].double() + b[name].double()) / 2).float()
    assert torch.equal(soup.load().state_dict()[name], mean)


def test_a_tower_of_a_whole_clip(online: LocalHub, tmp_path: Path) -> None:
    """The ancestor has more tensors, and the only processor."""
    lineage = check(TOWERS)
    assert (lineage.verdict, codes(lineage), ancestor(lineage)) == ("proven", set(), (CLIP, "card"))
    soup = cook(TOWERS, tmp_path / "soup")
    processor = json.loads((soup.folder / "preprocessor_config.json").read_text())
    assert processor["feature_extractor_type"] == "CLIPFeatureExtractor"
    loaded: Any = CLIPVisionModel.from_pretrained(soup.folder, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert sum(each.numel() for each in model.parameters()) == lineage.models.checkpoints[0].parameters


def test_a_tower_saved_by_a_new_version_has_other_names(online: LocalHub) -> None:
    lineage = check(TOWERS[:1])
    checkpoint = lineage.models.checkpoints[0]
    path = checkpoint.weights.source.fetch(checkpoint.weights.files[0])
    tower = load_file(path)
    renamed = {name.removeprefix("vision_model."): each for name, each in stand_ins.nearby(tower, 5).items()}
    files = {"config.json": as_json(dict(checkpoint.config)), "README.md": card(base_model=CLIP), **weights(renamed)}
    publish(online, "new-version/tower", files)
    lineage = check([TOWERS[0], "new-version/tower"])
    assert (lineage.verdict, codes(lineage)) == ("proven", set())
    assert "have other names on disk" in "".join(lineage.models.notes)


# ---- what a check reads ---------------------------------------------------------------------------------------


def weight_requests(hub: LocalHub, since: int) -> list[Record]:
    """Requests for contents of weight files, by their address or after its redirect."""
    return [
        each
        for each in hub.requests[since:]
        if each.method == "GET" and (each.path.endswith((".safetensors", ".bin")) or each.path.startswith("/cdn/"))
    ]


def range_bytes(record: Record) -> int:
    start, stop = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", record.range).groups())  # type: ignore[union-attr]
    return stop - start + 1


@pytest.fixture(scope="module")
def large(zoo: LocalHub) -> list[str]:
    """Two siblings of 13 MB and a stranger."""
    small: dict[str, Any] = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "intermediate_size": 512,
    }
    config = BertConfig(**small, vocab_size=6000, max_position_embeddings=64)
    models = [stand_ins.saved(stand_ins.built(BertForSequenceClassification, config, seed)) for seed in (0, 1)]
    made = {"a": stand_ins.nearby(models[0][1], 1), "b": stand_ins.nearby(models[0][1], 2), "odd": models[1][1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        for name, tensors in made.items():
            publish(zoo, f"large/{name}", {"config.json": as_json(models[0][0]), **weights(tensors)})
    return [f"large/{name}" for name in made]


def test_a_check_reads_little(online: LocalHub, large: Sequence[str], tmp_path: Path) -> None:
    """By ranges: at most 2 MB and 24 requests a model, its header apart, and none of it a whole weight file."""
    asked = len(online.requests)
    lineage = check(large[:2])
    assert lineage.verdict == "likely"
    assert lineage.models.checkpoints[0].source.files["model.safetensors"] > 10e6
    samples: dict[str, list[int]] = {}
    for record in weight_requests(online, asked):
        if record.path.startswith("/cdn/") and not record.range.startswith("bytes=0-"):
            samples.setdefault(record.path.rpartition("/")[2], []).append(range_bytes(record))
    assert len(samples) >= 2
    for sizes in samples.values():
        assert 10 < len(sizes) <= 24
        assert 5e5 < sum(sizes) <= 2e6
    assert lineage.transferred_bytes < 2 * 2.5e6
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_an_ancestor_may_have_anything_between_its_tensors(put: Put, online: LocalHub, bert: Any) -> None:
    """What lies between is not read along, however its file is laid out."""
    owner = put("a", 1).split("/")[0]
    padded: Tensors = {}
    for number, (name, each) in enumerate(sorted(bert[1].items())):
        padded[name] = each
        padded[f"{name}.between{number}"] = torch.zeros(100_000)
    put("wide", tensors=padded, base=None)
    asked = len(online.requests)
    lineage = check([put("a", 1, base=f"{owner}/wide"), put("b", 2, base=f"{owner}/wide")])
    assert lineage.verdict == "proven"
    assert sum(map(range_bytes, weight_requests(online, asked))) < 8e6


def test_nothing_is_fetched_for_what_is_refused(online: LocalHub, large: Sequence[str], tmp_path: Path) -> None:
    asked = len(online.requests)
    with pytest.raises(IncompatibleError, match="large/odd: the weights have nothing in common"):
        cook(large, tmp_path / "soup")
    assert all(each.range for each in weight_requests(online, asked))
    assert not (tmp_path / "soup").exists()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


# ---- references -----------------------------------------------------------------------------------------------


def test_the_ways_to_name_a_revision(put: Put, online: LocalHub) -> None:
    model, other = put("a", 1), put("b", 2)
    api = HfApi(endpoint=online.endpoint, token=online.token)
    commit = str(api.model_info(model).sha)
    api.create_tag(model, tag="v1")
    api.create_branch(model, branch="more/runs")
    page = f"https://huggingface.co/{model}"
    names = [
        model, f"{model}@main", f"{model}@v1", f"{model}@more/runs", f"{model}@{commit}", page, f"{page}/",
        f"{page}/tree/main", f"{page}/tree/more%2Fruns", f"{page}/commit/{commit}", f"{page}/blob/v1",
    ]  # fmt: skip
    found = {
        name: (each.model, each.revision) for name, each in zip(names, check(names).models.checkpoints, strict=True)
    }
    assert found == dict.fromkeys(names, (model, commit))
    with pytest.raises(ResolveError, match=f"'{model}@{'0' * 40}': there is no such branch, tag or commit"):
        check([f"{model}@{'0' * 40}", other])


def test_a_folder_beside_a_repo(
    put: Put, bert: tuple[dict[str, Any], Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its path or relative to here; what it says of itself counts, and its path stays here."""
    folder = tmp_path / "runs" / "best"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(as_json({**bert[0], "_name_or_path": "bert-base-uncased"}))
    (folder / "model.safetensors").write_bytes(weights(stand_ins.nearby(bert[1], 5))["model.safetensors"])
    other = put("a", 1)
    monkeypatch.chdir(tmp_path / "runs")
    pins = set()
    for name in ("best", "../runs/best", str(folder) + "/"):
        lineage = check([name, other])
        assert (lineage.verdict, codes(lineage), ancestor(lineage)) == ("proven", set(), (BERT, "card"))
        assert lineage.models.names == ("local:best", other)
        assert str(tmp_path) not in json.dumps(lineage.to_dict()) + str(lineage)
        pins.add(lineage.models.checkpoints[0].revision)
    assert len(pins) == 1
    assert pins.pop().startswith("sha256:")


def test_a_pull_request_offline(
    online: LocalHub, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was cooked once is checked again without a network, and marked."""
    models = ["sanjeev498/vit-base-beans@refs/pr/1", "zqTensor/vit-base-beans"]
    cook(models, tmp_path / "soup")
    asked = len(online.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = cli("check", *models, "--json")
    report = done.json
    assert (done.code, report["verdict"], report["transferred_bytes"]) == (0, "likely", 0)
    note = "the Hub was not reached; the commit is the one in the cache"
    assert [each["notes"] for each in report["ingredients"]] == [[note], [note]]
    assert len(online.requests) == asked
