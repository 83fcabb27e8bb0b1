"""The Trainer of transformers as its guide to text classification has it: dynamic padding.

torchrun --nproc-per-node N hf.py MODEL TRAIN VALIDATION EPOCHS LR SEED
"""

import os
import sys

import rows
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments


def main() -> None:
    """Trains; rank 0 prints the line."""
    model, train, validation, epochs, lr, seed = sys.argv[1:]
    world = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    data = rows.read(train)
    labels = rows.labels_of(data)
    net, tokenizer = rows.load(model, len(labels), int(seed))
    trainer = Trainer(
        net,
        TrainingArguments(
            os.environ["OUT"],
            per_device_train_batch_size=rows.BATCH // world,
            num_train_epochs=int(epochs),
            learning_rate=float(lr),
            weight_decay=0.01,
            seed=int(seed),
            use_cpu=rows.DEVICE == "cpu",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(rows.encoded(data, labels, tokenizer, pad=False)),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    seconds = trainer.train().metrics["train_runtime"]
    if trainer.is_world_process_zero():
        trainer.save_model()
        score = rows.accuracy(net, tokenizer, rows.read(validation), labels)
        rows.tell(len(data) * int(epochs), seconds, score)


main()
