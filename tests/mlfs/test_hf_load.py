"""Loading: transformers' logits, every key accounted for, clear errors."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlfs_jax.backbone.tree import flatten
from mlfs_jax.errors import CheckpointError, ConfigError, DataError, UnknownNameError
from mlfs_jax.hf.configs import from_hf, to_hf
from mlfs_jax.hf.export import export_hf
from mlfs_jax.hf.load import from_pretrained, load_checkpoint
from mlfs_jax.registry import get_entry, is_whole
from tests.mlfs.hf_oracle import (
    HEADS,
    NAMES,
    assert_equal_outputs,
    batch_for,
    random_config,
    random_torch_model,
    torch,
    transformers,
)
from tests.mlfs.tiny import tiny_model


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("head", HEADS)
def test_logits_of_random_models_equal_transformers(family, head, tmp_path):
    """Five random configs per family and head: 20 per family."""
    for seed in range(5):
        rng = np.random.default_rng([NAMES.index(family), HEADS.index(head), seed])
        theirs = random_torch_model(family, head, random_config(family, rng), seed)
        folder = tmp_path / str(seed)
        theirs.save_pretrained(folder)
        ours, report = load_checkpoint(folder)
        assert (report.initialised, report.dropped) == ((), ())
        assert ours.num_params == sum(p.numel() for p in theirs.parameters())
        assert_equal_outputs(ours, theirs, batch_for(ours.config, rng))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", NAMES)
def test_round_trip_gives_every_key_and_value_back(family, head, tmp_path):
    rng = np.random.default_rng(NAMES.index(family))
    random_torch_model(family, head, random_config(family, rng)).save_pretrained(tmp_path / "a")
    first, _ = load_checkpoint(tmp_path / "a")
    report = export_hf(first, tmp_path / "b")
    assert report.padded == {} and report.why == () and report.params_before == report.params_after
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key], err_msg=key)
    second, _ = load_checkpoint(tmp_path / "b")
    assert second.config == first.config
    for name, leaf in flatten(first.base).items():
        np.testing.assert_array_equal(leaf[...], flatten(second.base)[name][...], err_msg=name)


# ---- another head than the checkpoint's own


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Folders of one small BERT per head, by head."""
    folders = {}
    for head in HEADS:
        config = random_config("bert", np.random.default_rng(5), num_labels=3, num_hidden_layers=2)
        folders[head] = tmp_path_factory.mktemp(head)
        random_torch_model("bert", head, config).save_pretrained(folders[head])
    return folders


def test_a_new_head_on_a_base_model_keeps_its_pooler(bert):
    model, report = load_checkpoint(bert["none"], head="sequence", labels=4)
    assert report.initialised == ("head.out.bias", "head.out.kernel") and report.dropped == ()
    pooler = load_file(bert["none"] / "model.safetensors")["pooler.dense.weight"]
    np.testing.assert_array_equal(flatten(model.base)["head.dense.kernel"][...], pooler.T)


def test_other_heads_are_dropped_and_said_so(bert, caplog):
    _, report = load_checkpoint(bert["mlm"], head="token", labels=2)
    assert report.initialised == ("head.out.bias", "head.out.kernel")
    assert "cls.predictions.bias" in report.dropped and len(report.dropped) == 5
    model, report = load_checkpoint(bert["sequence"], head="none")
    assert model.config.pooler and report.initialised == ()
    assert set(report.dropped) == {"classifier.weight", "classifier.bias"}
    with caplog.at_level("INFO", "mlfs_jax"):
        from_pretrained(bert["mlm"], head="sequence", labels=2)
    assert "newly initialised: head.dense.bias" in caplog.text and "cls.predictions.bias" in caplog.text


def test_an_encoder_is_no_language_model(bert):
    with pytest.raises(ConfigError, match=r"none\d* is an encoder \(bert\): .* give a language model, such as"):
        from_pretrained(bert["none"], head="lm")


def test_a_classifier_of_another_kind_or_size_is_not_reused(bert):
    _, report = load_checkpoint(bert["token"], head="sequence", labels=3)
    assert "classifier.weight" in report.dropped and "head.out.kernel" in report.initialised
    _, report = load_checkpoint(bert["sequence"], labels=7)
    assert report.initialised == ("head.out.bias", "head.out.kernel")


def test_a_config_without_architectures_is_read_by_its_tensors(bert, tmp_path):
    hf = json.loads((bert["sequence"] / "config.json").read_text())
    del hf["architectures"]
    for own, initialised in (("sequence", ()), ("mlm", ("dense.bias", "dense.kernel", "out.bias", "out.kernel"))):
        write(bert[own], tmp_path, load_file(bert[own] / "model.safetensors"))
        (tmp_path / "config.json").write_text(json.dumps(hf))
        _, report = load_checkpoint(tmp_path, head="sequence")
        assert report.initialised == tuple(f"head.{name}" for name in initialised)


def test_a_new_head_depends_on_the_key_only(bert):
    def head(key):
        return np.asarray(flatten(load_checkpoint(bert["none"], head="token", key=key)[0].base)["head.out.kernel"][...])

    np.testing.assert_array_equal(head(1), head(jax.random.key(1)))
    assert np.abs(head(1) - head(2)).max() > 0


# ---- storage


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(bert, dtype, tmp_path):
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(bert["token"]).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    model, _ = load_checkpoint(tmp_path)
    assert {leaf[...].dtype for leaf in flatten(model.base).values()} == {jnp.dtype("float32")}
    assert_equal_outputs(model, theirs.float(), batch_for(model.config, np.random.default_rng(0)))
    half, _ = load_checkpoint(tmp_path, dtype=jnp.bfloat16)
    assert flatten(half.base)["layers.q.kernel"][...].dtype == jnp.bfloat16
    export_hf(half, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    again, _ = load_checkpoint(tmp_path / "out", dtype=jnp.bfloat16)
    np.testing.assert_array_equal(
        flatten(half.base)["layers.q.kernel"][...], flatten(again.base)["layers.q.kernel"][...]
    )


def test_sharded_files_and_placement(bert, tmp_path):
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(bert["token"])
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    seen = {}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(axes, shape):
        seen[axes] = shape
        return device

    model, report = load_checkpoint(tmp_path, sharding=place)
    assert len(report.files) > 1
    assert seen["layers", "heads", "head_dim", "embed"] == model.base["layers"]["o"]["kernel"].shape
    assert_equal_outputs(model, theirs, batch_for(model.config, np.random.default_rng(0)))
    load_checkpoint(tmp_path, sharding=device)


def test_legacy_names_buffers_and_equal_tied_copies_are_known(bert, tmp_path):
    tensors = load_file(bert["mlm"] / "model.safetensors")
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for k, v in tensors.items()}  # fmt: skip
    old["bert.embeddings.position_ids"] = np.arange(16)[None]
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].copy()
    old["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].copy()
    write(bert["mlm"], tmp_path, old)
    model, report = load_checkpoint(tmp_path)
    assert report.dropped == ()
    np.testing.assert_array_equal(
        flatten(model.base)["head.norm.scale"][...], tensors["cls.predictions.transform.LayerNorm.weight"]
    )
    old["cls.predictions.decoder.weight"][0, 0] += 1
    write(bert["mlm"], tmp_path, old)
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.decoder\.weight .*embed\.tokens\.table"):
        load_checkpoint(tmp_path)


# ---- bad checkpoints


def write(source: Path, folder: Path, tensors: dict, *, shards: int = 1) -> None:
    """A checkpoint with the config of ``source`` and these tensors, in one file or several."""
    (folder / "config.json").write_text((source / "config.json").read_text())
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    keys, weight_map = sorted(tensors), {}
    for i in range(shards):
        file, mine = f"model-{i + 1:05d}-of-{shards:05d}.safetensors", keys[i::shards]
        save_file({key: tensors[key] for key in mine}, folder / file)
        weight_map |= {key: file for key in mine}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


KEY = "bert.encoder.layer.1.intermediate.dense.weight"


@pytest.mark.parametrize("shards", [1, 3])
class TestBadTensors:
    def refuses(self, bert, folder, tensors, shards, *words):
        write(bert["token"], folder, tensors, shards=shards)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(folder)
        for word in words:
            assert word in str(error.value)

    @pytest.fixture
    def tensors(self, bert):
        return load_file(bert["token"] / "model.safetensors")

    def test_missing(self, bert, tmp_path, tensors, shards):
        del tensors[KEY]
        self.refuses(bert, tmp_path, tensors, shards, KEY, "lacks", ".safetensors")

    def test_missing_in_its_own_head(self, bert, tmp_path, tensors, shards):
        del tensors["classifier.bias"]
        self.refuses(bert, tmp_path, tensors, shards, "lacks", "classifier.bias")

    def test_unknown(self, bert, tmp_path, tensors, shards):
        tensors["bert.encoder.layer.2.output.dense.bias"] = np.zeros(3, np.float32)
        self.refuses(bert, tmp_path, tensors, shards, "bert.encoder.layer.2.output.dense.bias", "(3,)", ".safetensors")

    def test_mis_shaped(self, bert, tmp_path, tensors, shards):
        found, expected = (2, 3), tensors[KEY].shape
        tensors[KEY] = np.zeros(found, np.float32)
        self.refuses(bert, tmp_path, tensors, shards, KEY, str(found), str(expected), ".safetensors")

    def test_transposed_is_mis_shaped(self, bert, tmp_path, tensors, shards):
        tensors[KEY] = np.ascontiguousarray(tensors[KEY].T)
        self.refuses(bert, tmp_path, tensors, shards, KEY)

    def test_duplicate_with_and_without_prefix(self, bert, tmp_path, tensors, shards):
        tensors[KEY.removeprefix("bert.")] = tensors[KEY].copy()
        self.refuses(bert, tmp_path, tensors, shards, KEY, "twice")

    def test_not_floating_point(self, bert, tmp_path, tensors, shards):
        tensors[KEY] = tensors[KEY].astype(np.int8)
        self.refuses(bert, tmp_path, tensors, shards, KEY, "I8")


def test_half_a_pooler_is_not_replaced_by_a_new_one(bert, tmp_path):
    tensors = load_file(bert["none"] / "model.safetensors")
    del tensors["pooler.dense.bias"]
    write(bert["none"], tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"lacks bert\.pooler\.dense\.bias"):
        load_checkpoint(tmp_path, head="sequence")
    tensors["pooler.dense.bias"] = tensors.pop("pooler.dense.weight")[0].copy()
    write(bert["none"], tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"lacks bert\.pooler\.dense\.weight"):
        load_checkpoint(tmp_path, head="sequence")


def test_eight_bit_floats_are_quantised(bert, tmp_path):
    tensors = load_file(bert["token"] / "model.safetensors")
    write(bert["token"], tmp_path, tensors | {KEY: tensors[KEY].astype(np.int8)})
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].replace(b'"I8"', b'"F8_E4M3"')
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    with pytest.raises(CheckpointError, match=f"{KEY} in model.safetensors holds F8_E4M3"):
        load_checkpoint(tmp_path)


def test_one_label_is_a_score_as_in_transformers(bert):
    hf = json.loads((bert["sequence"] / "config.json").read_text())
    one = hf | {"id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": None}
    assert from_hf(one).problem == "regression"
    assert from_hf(one, labels=3).problem == from_hf(hf | {"problem_type": None}).problem == "classification"
    assert to_hf(from_hf(one))["problem_type"] == "regression"


def test_same_key_in_two_shards(bert, tmp_path):
    tensors = load_file(bert["token"] / "model.safetensors")
    write(bert["token"], tmp_path, tensors, shards=2)
    for file in tmp_path.glob("*.safetensors"):
        save_file(load_file(file) | {KEY: tensors[KEY]}, file)
    with pytest.raises(CheckpointError, match=f"{KEY} .*-00002-of-.* twice.*-00001-of-"):
        load_checkpoint(tmp_path)


def test_index_and_shards_must_agree(bert, tmp_path):
    tensors = load_file(bert["token"] / "model.safetensors")
    write(bert["token"], tmp_path, tensors, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    index.write_text(
        json.dumps({"weight_map": whole["weight_map"] | {"bert.other": "model-00001-of-00002.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"bert\.other"):
        load_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in whole["weight_map"].items() if k != KEY}}))
    with pytest.raises(CheckpointError, match=KEY):
        load_checkpoint(tmp_path)
    index.write_text(json.dumps(whole))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        load_checkpoint(tmp_path)
    for broken in ("{}", '{"weight_map": [1]}', '{"weight_map": {"a": null}}'):
        index.write_text(broken)
        with pytest.raises(CheckpointError, match="weight_map"):
            load_checkpoint(tmp_path)


def test_files_that_are_not_there_or_not_whole(bert, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text((bert["token"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        load_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        load_checkpoint(tmp_path)
    whole = (bert["token"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path)
    with pytest.raises(UnknownNameError, match="minilm-l6"):
        from_pretrained("minilm-16")


def test_an_adapter_of_peft_is_not_left_out(tmp_path):
    """transformers applies one that lies in a model's folder."""
    export_hf(tiny_model(), tmp_path / "model")
    for folder in (tmp_path / "model", tmp_path / "alone"):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds a PEFT adapter .* either merge it once"):
        from_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=r"only a PEFT adapter, to be merged .* no config\.json"):
        from_pretrained(tmp_path / "alone")


# ---- configs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"hidden_act": "quick_gelu"}, "hidden_act"),
        ({"num_attention_heads": 7}, "not a multiple"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"hidden_size": "12"}, "hidden_size = '12'"),
        ({"layer_norm_eps": "1e-5"}, "norm_eps = '1e-5'"),
        ({"architectures": ["BertForNextSentencePrediction"]}, "BertForNextSentencePrediction"),
        ({"architectures": None}, "head="),
        ({"problem_type": "multi_label_classification"}, "multi_label"),
        ({"tie_word_embeddings": False, "architectures": ["BertForMaskedLM"]}, "tie_word_embeddings"),
        ({"model_type": None}, "model_type"),
    ],
)
def test_configs_that_are_not_built_here(bert, change, words):
    hf = json.loads((bert["sequence"] / "config.json").read_text()) | {"hidden_size": 12, "num_attention_heads": 3}
    from_hf(hf)
    with pytest.raises(ConfigError, match=words):
        from_hf(hf | change)


def test_an_unknown_family_offers_the_nearest():
    with pytest.raises(UnknownNameError, match="roberta"):
        from_hf({"model_type": "deberta"})


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("distilbert", {"norm_eps": 1e-5}, "norm_eps"),
        ("distilbert", {"type_vocab": 2}, "type_vocab"),
        ("bert", {"embedding_size": 5}, "embedding_size"),
        ("bert", {"position_offset": 2}, "position_offset"),
        ("roberta", {"pad_token_id": 4}, "position_offset"),
        ("electra", {"head_activation": "relu"}, "head_activation"),
        ("bert", {"heads": 5}, "multiple"),
        ("bert", {"head_dim": 7}, "head_dim"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(family, change, words):
    config = from_hf({"model_type": family}, head="sequence", labels=3)
    assert from_hf(to_hf(config)) == config
    with pytest.raises(ConfigError, match=words):
        to_hf(config.replace(**change))


def test_labels_are_for_a_head_that_has_some():
    with pytest.raises(ConfigError, match=r"labels = 7, problem = None: head 'mlm' has none; give head = 'sequence'"):
        from_hf({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, labels=7)


def test_regression_and_label_names():
    config = from_hf({"model_type": "bert"}, head="sequence", labels=1, problem="regression")
    assert from_hf(to_hf(config)).problem == "regression"
    config = from_hf({"model_type": "bert"}, head="sequence", labels=2)
    assert to_hf(config, label_names=["no", "yes"])["label2id"] == {"no": 0, "yes": 1}
    with pytest.raises(ConfigError, match="2 different"):
        to_hf(config, label_names=["no", "no"])


# ---- real checkpoints


def fetched(name: str) -> Path:
    """Folder of a catalogue model that is in the cache (or under $MLFS_TEST_MODELS/<name>); else the test skips."""
    if own := os.environ.get("MLFS_TEST_MODELS"):
        return Path(own) / name
    entry = get_entry(name)
    folder = entry.cached
    if not is_whole(folder, entry):
        pytest.skip(f"{name} is not in the cache: run `mlfs fetch {name}`")
    return folder


@pytest.mark.parametrize(("name", "cls"), [("minilm-l6", "BertModel"), ("bert-tiny", "BertForMaskedLM")])
def test_real_checkpoints_equal_transformers(name, cls):
    folder = fetched(name)
    ours, report = load_checkpoint(folder)
    assert (report.initialised, report.dropped) == ((), ())
    theirs = getattr(transformers, cls).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["The quick brown fox [MASK] over the lazy dog.", "Zürich is a city."]
    batch = {k: np.asarray(v) for k, v in tokenizer(texts, padding=True).items()}
    assert_equal_outputs(ours, theirs, batch)
