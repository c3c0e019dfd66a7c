"""Trainers of others, on a small Llama: the losses on our attention are those on eager's, step by step."""

from __future__ import annotations

import datasets
import peft
import pytest
import torch
import transformers
import trl
from flash_attn.integrations import transformers as plus
from integrations import test_transformers as quick

STEPS, LENGTHS = 4, [7, 12, 5, 9, 11, 6, 8, 10]
OPTIONS = dict(
    use_cpu=True, max_steps=STEPS, per_device_train_batch_size=4, logging_steps=1, report_to="none", seed=0,
    save_strategy="no", learning_rate=1e-3, disable_tqdm=True,
)  # fmt: skip


def examples() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randint(1, 100, (n,), generator=generator).tolist() for n in LENGTHS * 4]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(100)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), pad_token="w0", eos_token="w2"
    )


def losses(trainer) -> torch.Tensor:
    trainer.train()
    return torch.tensor([x["loss"] for x in trainer.state.log_history if "loss" in x])


def model_on(attention: str, lora: bool):
    model = quick.build(quick.DECODERS["llama"])
    quick.choose(model, attention)
    if lora:
        torch.manual_seed(5)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    return model


def assert_same(run) -> None:
    eager, ours = (run(name) for name in ("eager", plus.NAME))
    assert len(eager) == STEPS and len(set(eager.tolist())) > 1
    torch.testing.assert_close(ours, eager, rtol=1e-3, atol=0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_transformers_trainer_without_padding(lora, tmp_path):
    """Ours packs the examples of a batch into one row; eager pads them. With all tokens in one batch the loss, a mean
    over tokens, is the same."""

    def run(attention):
        model = model_on(attention, lora)
        if attention == "eager":
            collator = transformers.DataCollatorForSeq2Seq(tokenizer(), padding=True)
        else:
            collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        arguments = transformers.TrainingArguments(str(tmp_path / attention), **OPTIONS)
        return losses(transformers.Trainer(model, arguments, data_collator=collator, train_dataset=examples()))

    assert_same(run)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trl_sft(lora, tmp_path):
    """Padded batches."""

    def run(attention):
        arguments = trl.SFTConfig(str(tmp_path / attention), **OPTIONS, max_length=16, bf16=False)
        data = examples().remove_columns("labels")
        model = model_on(attention, lora)
        return losses(trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer()))

    assert_same(run)


def test_trl_sft_packed(tmp_path):
    """Packed by trl, told by position_ids; eager's masks know of them too."""

    def run(attention):
        arguments = trl.SFTConfig(str(tmp_path / attention), **OPTIONS, max_length=24, bf16=False, packing=True)
        data = examples().remove_columns("labels")
        model = model_on(attention, False)
        return losses(trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer()))

    assert_same(run)
