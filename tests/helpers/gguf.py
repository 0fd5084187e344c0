"""GGUF files of tiny models, as llama.cpp's converter writes them."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file


def write_gguf(model: Path, file: Path, kind: str = "F32", *, name: str = "tiny", architecture: str = "llama") -> Path:
    """Write a Llama's folder into one file. Matrices of the layers are stored as `kind`, such as Q8_0."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for theirs, tensor in load_file(model / "model.safetensors").items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(theirs.split(".")[-2])
        if heads:
            tensor = _permute(tensor, config[heads])
        to = getattr(gguf.GGMLQuantizationType, kind if ".layers." in theirs and tensor.ndim == 2 else "F32")
        writer.add_tensor(names.get_name(theirs, (".weight",)), gguf.quantize(tensor, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _permute(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp pairs neighbouring dimensions in its rope, Transformers the two halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, 2, rows // n_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path) -> None:
    backend = json.loads((model / "tokenizer.json").read_text())
    specials = {token["content"] for token in backend["added_tokens"]}
    ids = dict(sorted(backend["model"]["vocab"].items(), key=lambda item: item[1]))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(ids))
    writer.add_token_types([gguf.TokenType.CONTROL if token in specials else gguf.TokenType.NORMAL for token in ids])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((model / "chat_template.jinja").read_text())
