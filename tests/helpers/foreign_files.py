"""Files of settings as users of TRL, Axolotl and LLaMA-Factory have them, with the data and models that they name."""

import json
from pathlib import Path

from tests.helpers.project import pair

AXOLOTL = """\
base_model: NousResearch/Meta-Llama-3-8B-Instruct
model_type: AutoModelForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false

chat_template: llama3
rl: dpo
rl_beta: 0.05
datasets:
  - path: fozziethebeat/alpaca_messages_2k_dpo_test
    type: chat_template.default
    field_messages: conversation
    field_chosen: chosen
    field_rejected: rejected
    message_property_mappings:
      role: role
      content: content
    roles:
      system: [system]
      user: [user]
      assistant: [assistant]
  - path: Intel/orca_dpo_pairs
    type: chatml.intel
    split: train[:500]
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/lora-out

sequence_len: 4096
sample_packing: false
pad_to_sequence_len: true

adapter: qlora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true

wandb_project: llama3-dpo
wandb_entity:
wandb_watch:
wandb_name: first
wandb_log_model:

gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
eval_table_size:
saves_per_epoch: 1
debug:
deepspeed:
weight_decay: 0.0
fsdp:
fsdp_config:
special_tokens:
  pad_token: <|end_of_text|>
"""

LLAMAFACTORY = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true

### method
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid  # choices: [sigmoid (dpo), orpo, simpo]

### dataset
dataset: dpo_en_demo, feedback
dataset_dir: data
template: llama3
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/llama3-8b/lora/dpo
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""

DATASET_INFO = {
    "dpo_en_demo": {
        "file_name": "dpo_en_demo.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "feedback": {
        "hf_hub_url": "org/feedback",
        "subset": "easy",
        "ranking": True,
        "columns": {"prompt": "question", "chosen": "better", "rejected": "worse"},
    },
    "kto_en_demo": {
        "file_name": "kto_en_demo.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
}


def write_dataset_info(folder: Path, n: int = 40) -> Path:
    """Write LLaMA-Factory's data folder, with pairs and labels in its files."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [pair(i) for i in range(n)]
    sharegpt = [
        {
            "conversations": [{"from": "human", "value": each["prompt"]}],
            "chosen": {"from": "gpt", "value": each["chosen"]},
            "rejected": {"from": "gpt", "value": each["rejected"]},
        }
        for each in pairs
    ]
    labels = [
        {
            "messages": [
                {"role": "user", "content": each["prompt"]},
                {"role": "assistant", "content": each["chosen" if i % 2 else "rejected"]},
            ],
            "label": bool(i % 2),
        }
        for i, each in enumerate(pairs)
    ]
    (folder / "dpo_en_demo.json").write_text(json.dumps(sharegpt))
    (folder / "kto_en_demo.json").write_text(json.dumps(labels))
    (folder / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    return folder
