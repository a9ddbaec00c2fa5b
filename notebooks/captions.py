# Databricks notebook source
# %% [markdown]
# # The captions of a lake
# Images with every caption that was written of them and the prompts that training composes; what they cost; the captioners beside each other.
# Runs on Databricks as it is, in Jupyter (`jupytext --to ipynb notebooks/captions.py`), and anywhere else as plain Python:
# `python notebooks/captions.py conf/demo.yaml`, which leaves the page `captions.html` beside the report.

# COMMAND ----------
# %%
import sys

from conf.section import Mistake
from conf.settings import load
from jobs import caption_ledger, caption_page, caption_sample, caption_tiers, compare_captioners, session
from jobs.lake import Lake

config = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1].endswith(".yaml") else "conf/demo.yaml"
settings = load(config)
lake = Lake(session.start(settings.spark), settings)

# COMMAND ----------
# %% [markdown]
# ## Who captions which image
# The tiers of the config, and what is still to be asked. Before anything is sent, `python -m jobs.caption --config FILE --plan` shows images and money.

# COMMAND ----------
# %%
caption_tiers.assigned(lake, settings, caption_sample.images(lake)).groupBy("tier").count().orderBy("tier").show(truncate=False)
caption_tiers.pending(lake, settings).groupBy("tier").count().withColumnRenamed("count", "waiting").orderBy("tier").show(truncate=False)

# COMMAND ----------
# %% [markdown]
# ## What there is: texts by captioner and kind

# COMMAND ----------
# %%
lake.read("captions").groupBy("tier", "engine", "model", "prompt", "kind").count().orderBy("tier", "engine", "kind").show(
    100, truncate=False
)

# COMMAND ----------
# %% [markdown]
# ## What it cost: the ledger

# COMMAND ----------
# %%
caption_ledger.summed(lake).show(100, truncate=False)

# COMMAND ----------
# %% [markdown]
# ## The captioners beside each other
# Where `compare_captioners` names two or more. A second run on the same rows does nothing; MLflow holds the tables.

# COMMAND ----------
# %%
if settings.compare_captioners.captioners:
    try:
        compare_captioners.run(lake, settings)
    except Mistake as mistake:  # such as a captioner that has not been asked yet: what there is stands below all the same
        print(mistake)

# COMMAND ----------
# %% [markdown]
# ## Images with all their captions and prompts
# Another composed prompt in every epoch; below, V7's order and three epochs of the varied mix. Then the images about which captioners disagree most.

# COMMAND ----------
# %%
page = caption_page.html(lake, settings)
if "displayHTML" in globals():  # Databricks
    globals()["displayHTML"](page)
else:
    lake.opener.write(caption_page.uri(settings), page.encode())
    print(f"captions: {caption_page.uri(settings)}")
