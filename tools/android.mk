# The Kotlin library and the app, without Android SDK, Gradle or phone. Included by the Makefile at the top.
# Needs JDK 17, Maven and npm; everything else comes from their registries, by the versions of pins.toml.
ANDROID_BUILD := android_demo/build
MVN ?= mvn -B -q -Dkotlin.compiler.daemon=false
# A folder with Gemma's own tokenizer.json, which is not ours to ship: make android-test GEMMA_TOKENIZER=FOLDER
GEMMA_TOKENIZER ?=

# Kotlin and Python must run the same ONNX Runtime to be compared bit for bit: the newest one for Java, so not the .venv's.
FIXTURE_PYTHON := $(ANDROID_BUILD)/python
FIXTURES := $(ANDROID_BUILD)/fixtures
FIXTURE_BUNDLES := $(BUNDLE) $(ANDROID_BUILD)/bundles/float-cache $(ANDROID_BUILD)/bundles/random

# The library's classes go into the APK as Maven compiled them
GEMMA := android_demo/gemma/target

.PHONY: android-test android-screenshots

$(GEMMA)/.compiled: android_demo/gemma/pom.xml $(wildcard android_demo/gemma/src/main/kotlin/gemma/edge/*.kt)
	$(MVN) -f android_demo/gemma/pom.xml compile
	@touch $@

android-test: $(FIXTURES)/.made
	rm -rf $(FIXTURES)/from-kotlin
	$(MVN) -f android_demo/gemma/pom.xml test
	@touch $(GEMMA)/.compiled
	PYTHONPATH=src $(FIXTURE_PYTHON)/bin/python tools/kotlin_fixtures/check_states.py $(FIXTURES)
	$(BIN)/python tools/apk/test_app.py $(BUNDLE)

# The pictures in docs/android, from the tests of the screens
android-screenshots: $(FIXTURES)/.made $(GEMMA)/.compiled
	$(BIN)/python tools/apk/test_app.py $(BUNDLE) --screenshots docs/android

$(FIXTURES)/.made: $(FIXTURE_PYTHON)/.set-up $(FIXTURE_BUNDLES:=/manifest.json) $(wildcard android_demo/scripts/*fixtures.py)
	PYTHONPATH=src $(FIXTURE_PYTHON)/bin/python tools/kotlin_fixtures/fixtures.py $(FIXTURES) demo/tiny-gemma2 $(FIXTURE_BUNDLES) \
		$(if $(GEMMA_TOKENIZER),--gemma $(GEMMA_TOKENIZER))
	@touch $@

$(FIXTURE_PYTHON)/.set-up: $(STAMP) tools/kotlin_fixtures/fixtures-requirements.txt
	mkdir -p $(ANDROID_BUILD)
	grep -v '^onnxruntime' constraints.txt > $(ANDROID_BUILD)/constraints.txt
	test -x $(FIXTURE_PYTHON)/bin/python || $(PYTHON) -m venv $(FIXTURE_PYTHON)
	PATH="$(BIN):$$PATH" uv pip install --quiet --python $(FIXTURE_PYTHON)/bin/python \
		-r tools/kotlin_fixtures/fixtures-requirements.txt -c $(ANDROID_BUILD)/constraints.txt
	@touch $@

$(BUNDLE)/manifest.json:
	$(MAKE) demo

# A float32 cache whose context ends soon
$(ANDROID_BUILD)/bundles/float-cache/manifest.json: $(STAMP)
	$(BIN)/gemma-export demo/tiny-gemma2 --target android --bits 8 --kv-bits 32 --context 128 --prefill-chunk 16 --verify none \
		-o $(@D) --force

# Another shape: three layers, windows of 8 and 24
$(ANDROID_BUILD)/bundles/random/manifest.json: $(STAMP) tools/kotlin_fixtures/random_checkpoint.py
	$(BIN)/python tools/kotlin_fixtures/random_checkpoint.py $(ANDROID_BUILD)/random
	$(BIN)/gemma-export $(ANDROID_BUILD)/random --target android --bits 4 --method rtn --kv-bits 32 --context 24 --prefill-chunk 5 \
		--verify none -o $(@D) --force

.PHONY: android

# The APK, with the demo's bundle in it; ORT_AAR=FILE takes ONNX Runtime's official AAR, SHRINK=1 lets R8 shrink it.
android: $(STAMP) $(BUNDLE)/manifest.json $(GEMMA)/.compiled
	$(BIN)/python tools/apk/build_apk.py $(BUNDLE) $(if $(ORT_AAR),--ort-aar $(ORT_AAR)) $(if $(SHRINK),--shrink)
