"""The golden files of the original code as our variants, parameters, gradients and batches.

A small rename of the LAVIS names, apart from the package's converters: the two can disagree.
The files hold rows of the original layout; `batch` compacts them into ours.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from jax_instructblip.models.variants import (
    LlamaConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
)
from tests.helpers.rows import lay_out

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
CASES = ("instruct_t5", "instruct_vicuna", "instruct_t5_noqftext", "instruct_vicuna_noqftext")
IGNORE = -100


def variant(case: str) -> Variant:
    document = json.loads((GOLDEN / case / "config.json").read_text())
    dims, llm, shapes = document["dims"], document["llm"], document["shapes"]
    if "d_model" in llm:
        language = T5Config(
            width=llm["d_model"],
            head_width=llm["d_kv"],
            heads=llm["num_heads"],
            mlp=llm["d_ff"],
            encoder_layers=llm["num_layers"],
            decoder_layers=llm["num_decoder_layers"],
            vocab=shapes["t5_model.lm_head.weight"][0],
            activation=llm["dense_act_fn"],
        )
    else:
        language = LlamaConfig(
            width=llm["hidden_size"],
            heads=llm["num_attention_heads"],
            mlp=llm["intermediate_size"],
            layers=llm["num_hidden_layers"],
            vocab=shapes["llm_model.lm_head.weight"][0],
        )
    qformer = QFormerConfig(
        vision_width=dims["vit_w"],
        llm_width=language.width,
        width=dims["q_hidden"],
        layers=dims["q_layers"],
        heads=dims["q_heads"],
        mlp=dims["q_ffn"],
        vocab=shapes.get("Qformer.bert.embeddings.word_embeddings.weight", [0])[0],
        max_positions=dims["q_max_pos"],
        queries=dims["nq"],
        instruction_aware=document["qformer_text_input"],
    )
    vision = VisionConfig(
        image_size=dims["img"],
        patch_size=dims["patch"],
        width=dims["vit_w"],
        layers=dims["vit_d"],
        heads=dims["vit_h"],
        mlp=int(dims["vit_w"] * dims["mlp_ratio"]),
    )
    return Variant("instructblip", vision, qformer, language)


def params(case: str) -> dict:
    tensors, sizes = load_file(_weights(case)), variant(case)
    llm = _t5 if sizes.llm.kind == "t5" else _llama
    return {
        "vision": _vision(tensors, sizes.vision),
        "qformer": _qformer(tensors, sizes.qformer),
        "llm": llm(tensors, sizes.llm),
    }


def gradients(case: str, tag: str = "train") -> dict:
    """The gradients of the Q-Former tree; a tensor that the original gave none has zeros."""
    found = outputs(case)
    shapes = json.loads((GOLDEN / case / "config.json").read_text())["shapes"]
    grads = {
        name: found.get(f"{tag}/grad/{name}", np.zeros(shape, np.float32))
        for name, shape in shapes.items()
    }
    return _qformer(grads, variant(case).qformer)


def outputs(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / case / "outputs.npz") as file:
        return dict(file)


def images(name: str = "image") -> np.ndarray:
    """Normalised pixels `[B, F, H, W, 3]` of 'image' (one frame) or 'video' (four)."""
    pixels = np.load(GOLDEN / "shared" / f"{name}.npy")
    pixels = pixels[:, :, None] if pixels.ndim == 4 else pixels  # [B, 3, F, H, W]
    return pixels.transpose(0, 2, 3, 4, 1)


def batch(case: str, tag: str) -> dict[str, np.ndarray]:
    """The batch that the original made of the samples of `tag`, in our layout."""
    sizes, found = variant(case), outputs(case)
    kind = "generate" if tag.startswith("generate") else "train"
    prefix = "" if kind == "generate" else "llm_"
    inputs, valid = (
        found[f"{tag}/{prefix}inputs_embeds"],
        found[f"{tag}/{prefix}attention_mask"] > 0,
    )
    frames = images("video" if tag == "generate_video" else "image")[: len(inputs)]
    skip = frames.shape[1] * sizes.visual_tokens

    # Token ids are not stored, but each embedded one is a row of the table, bit for bit.
    table = params(case)["llm"]["embed"]["embedding"]
    ids = {row.tobytes(): index for index, row in enumerate(table)}
    rows = [
        [ids[x.tobytes()] for x in row[visible][skip:]]
        for row, visible in zip(inputs, valid, strict=True)
    ]
    made = {"images": frames, "tokens": pad(rows, 0)}
    made["mask"] = pad([[True] * len(row) for row in rows], False)

    if sizes.qformer.instruction_aware:
        made["qformer_tokens"] = found[f"{tag}/qformer_text_ids"]
        made["qformer_mask"] = made["qformer_tokens"] != 0  # BERT's [PAD]
    if kind == "train":
        labels = found[f"{tag}/llm_labels"]
        if sizes.llm.kind == "t5":
            made["targets"] = labels
            shifted = np.pad(labels, ((0, 0), (1, 0)))[:, :-1]
            made["decoder_tokens"] = np.where(shifted == IGNORE, 0, shifted)
        else:  # position t is to tell the token after it
            made["targets"] = pad(
                [
                    [*row[visible][skip + 1 :], IGNORE]
                    for row, visible in zip(labels, valid, strict=True)
                ],
                IGNORE,
            )
    return lay_out(sizes, made)


def pad(rows: list[list], value: int | bool) -> np.ndarray:
    """Rows of different lengths as one array, filled up with `value` at their ends."""
    longest = max(len(row) for row in rows)
    filled = [[*row, *[value] * (longest - len(row))] for row in rows]
    return np.array(filled, bool if isinstance(value, bool) else np.int32)


def _weights(case: str) -> Path:
    return GOLDEN / case.removesuffix("_noqftext") / "weights.safetensors"


def _vision(tensors: dict, c: VisionConfig) -> dict:
    def layer(i: int) -> dict:
        own = f"visual_encoder.blocks.{i}"
        query, key, value = np.split(tensors[f"{own}.attn.qkv.weight"], 3)
        bias = lambda name: tensors[f"{own}.attn.{name}_bias"].reshape(c.heads, -1)
        attention = {
            "query": {"kernel": _split(query, c.heads), "bias": bias("q")},
            "key": {"kernel": _split(key, c.heads)},
            "value": {"kernel": _split(value, c.heads), "bias": bias("v")},
            "out": _join(tensors, f"{own}.attn.proj", c.heads),
        }
        return {
            "attention_norm": _norm(tensors, f"{own}.norm1"),
            "attention": attention,
            "mlp_norm": _norm(tensors, f"{own}.norm2"),
            "mlp": {name: _linear(tensors, f"{own}.mlp.fc{n}") for name, n in _FC.items()},
        }

    own = "visual_encoder"
    kernel = tensors[f"{own}.patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    return {
        "cls": tensors[f"{own}.cls_token"],
        "pos_embed": tensors[f"{own}.pos_embed"],
        "patch_embed": {"kernel": kernel, "bias": tensors[f"{own}.patch_embed.proj.bias"]},
        "layers": _stack([layer(i) for i in range(c.layers)]),
    }


def _qformer(tensors: dict, c: QFormerConfig) -> dict:
    def attention(own: str) -> dict:
        return {
            name: _heads(tensors, f"{own}.self.{name}", c.heads)
            for name in ("query", "key", "value")
        } | {"out": _join(tensors, f"{own}.output.dense", c.heads)}

    def mlp(name: str, own: str, suffix: str) -> dict:
        output = f"{own}.output{suffix}"
        layers = {
            "in": _linear(tensors, f"{own}.intermediate{suffix}.dense"),
            "out": _linear(tensors, f"{output}.dense"),
        }
        return {name: layers, f"{name}_norm": _norm(tensors, f"{output}.LayerNorm")}

    def layer(i: int) -> dict:
        own = f"Qformer.bert.encoder.layer.{i}"
        made = {
            "attention": attention(f"{own}.attention"),
            "attention_norm": _norm(tensors, f"{own}.attention.output.LayerNorm"),
            **mlp("query_mlp", own, "_query"),
        }
        if i % 2 == 0:
            made["cross_attention"] = attention(f"{own}.crossattention")
            norm = _norm(tensors, f"{own}.crossattention.output.LayerNorm")
            made["cross_attention_norm"] = norm
        return made | (mlp("text_mlp", own, "") if c.instruction_aware else {})

    projection = "t5_proj" if "t5_proj.weight" in tensors else "llm_proj"
    embeddings = "Qformer.bert.embeddings"
    made = {
        "image_norm": _norm(tensors, "ln_vision"),
        "queries": tensors["query_tokens"],
        "embed_norm": _norm(tensors, f"{embeddings}.LayerNorm"),
        "layers": {
            "cross": _stack([layer(i) for i in range(0, c.layers, 2)]),
            "plain": _stack([layer(i) for i in range(1, c.layers, 2)]),
        },
        "projection": _linear(tensors, projection),
    }
    if c.instruction_aware:
        for ours, theirs in (("text", "word"), ("position", "position")):
            table = tensors[f"{embeddings}.{theirs}_embeddings.weight"]
            made[f"{ours}_embed"] = {"embedding": table}
    return made


def _t5(tensors: dict, c: T5Config) -> dict:
    def attention(own: str) -> dict:
        return {
            name: _heads(tensors, f"{own}.{name[0]}", c.heads) for name in ("query", "key", "value")
        } | {"out": _join(tensors, f"{own}.o", c.heads)}

    def layer(own: str, parts: tuple[str, ...]) -> dict:
        made = {}
        for i, part in enumerate(parts):
            made[f"{part}_norm"] = _norm(tensors, f"{own}.{i}.layer_norm")
            if part != "mlp":
                kind = "SelfAttention" if part == "attention" else "EncDecAttention"
                made[part] = attention(f"{own}.{i}.{kind}")
                continue
            dense = {"gate": "wi_0", "in": "wi_1", "out": "wo"}
            made[part] = {
                name: _linear(tensors, f"{own}.{i}.DenseReluDense.{theirs}")
                for name, theirs in dense.items()
            }
        return made

    def stack(own: str, count: int, parts: tuple[str, ...]) -> dict:
        bias = f"{own}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return {
            "relative_bias": tensors[bias],
            "layers": _stack([layer(f"{own}.block.{i}.layer", parts) for i in range(count)]),
            "norm": _norm(tensors, f"{own}.final_layer_norm"),
        }

    decoder = ("attention", "cross_attention", "mlp")
    return {
        "embed": {"embedding": tensors["t5_model.shared.weight"]},
        "encoder": stack("t5_model.encoder", c.encoder_layers, ("attention", "mlp")),
        "decoder": stack("t5_model.decoder", c.decoder_layers, decoder),
        "head": _linear(tensors, "t5_model.lm_head"),
    }


def _llama(tensors: dict, c: LlamaConfig) -> dict:
    def layer(i: int) -> dict:
        own = f"llm_model.model.layers.{i}"
        attention = {
            name: _heads(tensors, f"{own}.self_attn.{name[0]}_proj", c.heads)
            for name in ("query", "key", "value")
        }
        dense = {"gate": "gate_proj", "in": "up_proj", "out": "down_proj"}
        return {
            "attention_norm": _norm(tensors, f"{own}.input_layernorm"),
            "attention": attention | {"out": _join(tensors, f"{own}.self_attn.o_proj", c.heads)},
            "mlp_norm": _norm(tensors, f"{own}.post_attention_layernorm"),
            "mlp": {k: _linear(tensors, f"{own}.mlp.{name}") for k, name in dense.items()},
        }

    return {
        "embed": {"embedding": tensors["llm_model.model.embed_tokens.weight"]},
        "layers": _stack([layer(i) for i in range(c.layers)]),
        "norm": _norm(tensors, "llm_model.model.norm"),
        "head": _linear(tensors, "llm_model.lm_head"),
    }


_FC = {"in": 1, "out": 2}


def _linear(tensors: dict, name: str) -> dict:
    return {"kernel": tensors[f"{name}.weight"].T} | _bias(tensors, name)


def _heads(tensors: dict, name: str, heads: int) -> dict:
    bias = {key: leaf.reshape(heads, -1) for key, leaf in _bias(tensors, name).items()}
    return {"kernel": _split(tensors[f"{name}.weight"], heads)} | bias


def _join(tensors: dict, name: str, heads: int) -> dict:
    kernel = tensors[f"{name}.weight"].T
    return {"kernel": kernel.reshape(heads, -1, kernel.shape[-1])} | _bias(tensors, name)


def _norm(tensors: dict, name: str) -> dict:
    return {"scale": tensors[f"{name}.weight"]} | _bias(tensors, name)


def _bias(tensors: dict, name: str) -> dict:
    return {"bias": tensors[f"{name}.bias"]} if f"{name}.bias" in tensors else {}


def _split(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.T.reshape(weight.shape[1], heads, -1)


def _stack(layers: list[dict]) -> dict:
    first = layers[0]
    if not isinstance(first, dict):
        return np.stack(layers)
    return {key: _stack([layer[key] for layer in layers]) for key in first}
