"""The classic loop: BERT for sequence classification, AdamW, loss.backward(), step().

python examples/bert_loop_eager.py [MODEL]     a folder or a name on the Hugging Face hub
"""

import sys

import torch
from torch.nn import CrossEntropyLoss
from torch.optim import AdamW
from transformers import AutoModelForSequenceClassification, AutoTokenizer

TEXTS = [
    "a joy from start to finish",
    "dull, and far too long",
    "I laughed and cried",
    "not worth the ticket",
]
LABELS = [1, 0, 1, 0]

torch.manual_seed(0)
name = sys.argv[1] if len(sys.argv) > 1 else "bert-base-uncased"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
optimizer = AdamW(model.parameters(), lr=2e-5)
loss_function = CrossEntropyLoss()

batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
labels = torch.tensor(LABELS)
model.train()
for step in range(10):
    loss = loss_function(model(**batch).logits, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.6f}")
