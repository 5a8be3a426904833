"""Builds a `RunTrainer` from a prepared run folder: tokenizer, model, batches and arguments."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from minisft.chat.registry import template_for
from minisft.chat.tokenizers import HuggingFaceTokenizer
from minisft.errors import UserError
from minisft.model.configs import model_config
from minisft.model.loading import load_model
from minisft.model.loss import LossHead, supports_loss_head
from minisft.model.packed_attention import PER_DOCUMENT, supports_padding_free
from minisft.run.folder import Run, checkpoint_step
from minisft.training.batch_sampler import Packs, RankBatches
from minisft.training.collators import PaddingFree, PadRight, WithRows
from minisft.training.dataset import TEST_ROWS, load_rows, row_lengths
from minisft.training.heartbeat import Heartbeat
from minisft.training.trainer import RunTrainer


def make_trainer(
    run: Run, rank: int, world: int, on_gpu: bool, checkpoint: Path | None, heartbeat: Heartbeat
) -> RunTrainer:
    """Return the trainer of `rank` among `world` ranks; steps count from `checkpoint`, if given.

    Raises `UserError` if the model cannot train with this batching, or the rows do not fill one
    global batch.
    """
    config = run.config
    trust = config.trust_remote_code
    tokenizer = HuggingFaceTokenizer(run.model_folder, config.template)
    tokenizer.hf.chat_template = template_for(tokenizer, config.template).jinja()
    # Before TrainingArguments exist: afterwards, at stage 3, every new model is partitioned over
    # the ranks.
    with_head = supports_loss_head(model_config(run.model_folder, trust), trust)
    arguments = _arguments(run, on_gpu)
    model = load_model(run.model_folder, tokenizer, trust)
    model.config.use_cache = False
    model.generation_config.eos_token_id = tokenizer.stop_ids if tokenizer.stop_ids[1:] else tokenizer.eos_id
    model.generation_config.pad_token_id = tokenizer.pad_id
    padding_free = config.batching != "padded" and supports_padding_free(model)
    if padding_free:
        model.set_attn_implementation(PER_DOCUMENT)
    elif config.batching in ("padding-free", "packed"):
        raise UserError(f"this model's attention cannot keep the rows of a {config.batching} batch apart: use padded")

    rows = load_rows(run.folder / "data")
    lengths = row_lengths(rows)
    if config.batching == "packed":
        rows = Packs(rows, lengths, config.max_length)
        lengths = rows.lengths
    batches = RankBatches(
        lengths, config.batch_size, config.accumulation, world, rank, config.seed, by_length=not padding_free
    )
    if not len(batches):
        raise UserError(
            f"{len(lengths)} rows do not fill one global batch of {config.global_batch}: "
            "lower the batch size, the accumulation or the ranks, or give more data"
        )
    tests = load_rows(run.folder / "data", TEST_ROWS).to_list() if config.eval_rows else []
    return RunTrainer(
        run=run,
        batches=batches,
        head=LossHead(model.get_output_embeddings()) if with_head else None,
        padding_free=padding_free,
        start=checkpoint_step(checkpoint) if checkpoint else 0,
        heartbeat=heartbeat,
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=tests,
        data_collator=WithRows(PaddingFree() if padding_free else PadRight(tokenizer.pad_id)),
        processing_class=tokenizer.hf,
    )


def _arguments(run: Run, on_gpu: bool) -> TrainingArguments:
    config = run.config
    return TrainingArguments(
        output_dir=str(run.folder),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=run.precision == "bf16",
        fp16=run.precision == "fp16",
        use_cpu=not on_gpu,
        deepspeed=run.deepspeed,
        save_strategy="steps" if config.save_steps else "epoch",
        save_steps=config.save_steps or 500,
        save_only_model=not config.resumable,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
        activation_checkpointing=config.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        dataloader_pin_memory=on_gpu,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
