# Builds and tests the Kotlin library and the app without Android SDK, Gradle or phone. The Makefile at the top includes it.
# It needs JDK 17, Maven and npm; everything else comes from their registries, in the versions of tools/apk/pins.toml.
ANDROID_BUILD := android_demo/build
MVN ?= mvn -B -q -Dkotlin.compiler.daemon=false
# GEMMA_TOKENIZER: a folder with Gemma's own tokenizer.json, which we may not distribute: make android-test GEMMA_TOKENIZER=FOLDER
GEMMA_TOKENIZER ?=

# Kotlin and Python are compared bit for bit, so both must run the same ONNX Runtime. The newest release for Java is another one
# than the .venv's, so the fixtures have a Python environment of their own.
FIXTURE_PYTHON := $(ANDROID_BUILD)/python
FIXTURES := $(ANDROID_BUILD)/fixtures
FIXTURE_BUNDLES := $(BUNDLE) $(addprefix $(ANDROID_BUILD)/bundles/,float-cache random random-gemma3)

# Maven compiles the library's classes for the tests and for the APK.
GEMMA := android_demo/build/classes

.PHONY: android android-test android-native-test android-screenshots

$(GEMMA)/.compiled: $(wildcard android_demo/pom.xml android_demo/*/pom.xml) $(shell find android_demo/gemma*/src/main -name '*.kt')
	rm -rf android_demo/gemma*/target/classes # Maven leaves the classes of sources that are gone
	$(MVN) -f android_demo/pom.xml compile
	@mkdir -p $(@D)
	@touch $@

android-test: $(FIXTURES)/.made $(GEMMA)/.compiled
	rm -rf $(FIXTURES)/from-kotlin
	$(MVN) -f android_demo/pom.xml test
	PYTHONPATH=src $(FIXTURE_PYTHON)/bin/python tools/kotlin_fixtures/check_states.py $(FIXTURES)
	$(BIN)/python tools/apk/test_app.py $(BUNDLE)

# Tests all engines on Android's own x86_64 libraries. The Python packages of the .venv give the answers for ExecuTorch and LiteRT.
NATIVE := $(ANDROID_BUILD)/native
NATIVE_BUNDLES := $(NATIVE)/bundles/random $(NATIVE)/bundles/tiny-gemma2

android-native-test: $(FIXTURES)/.made $(NATIVE)/fixtures/.made $(GEMMA)/.compiled
	$(MVN) -f android_demo/pom.xml test-compile
	PYTHONPATH=tools/apk $(BIN)/python tools/native/run_tests.py $(NATIVE)/fixtures $(BUNDLE)

$(NATIVE)/fixtures/.made: $(NATIVE_BUNDLES:=/manifest.json) tools/kotlin_fixtures/native_fixtures.py tools/kotlin_fixtures/model_fixtures.py
	$(BIN)/python tools/kotlin_fixtures/native_fixtures.py $(@D) $(NATIVE_BUNDLES)
	@touch $@

$(NATIVE)/bundles/tiny-gemma2/manifest.json: $(STAMP)
	$(BIN)/gemma-export demo/tiny-gemma2 --backend executorch,tflite --target android --bits 4 --quality fast --verify none -o $(@D) --force

$(NATIVE)/bundles/random/manifest.json: $(ANDROID_BUILD)/bundles/random/manifest.json
	$(BIN)/gemma-export $(ANDROID_BUILD)/random --backend executorch,tflite --target android --bits 4 --method rtn --context 24 \
		--prefill-chunk 5 --verify none -o $(@D) --force

# Takes the screenshots of docs/android: the tests of the screens draw them.
android-screenshots: $(FIXTURES)/.made $(GEMMA)/.compiled
	$(BIN)/python tools/apk/test_app.py $(BUNDLE) --screenshots docs/android

$(FIXTURES)/.made: $(FIXTURE_PYTHON)/.set-up $(FIXTURE_BUNDLES:=/manifest.json) $(wildcard tools/kotlin_fixtures/*fixtures.py)
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

# A bundle with a float32 cache and a short context
$(ANDROID_BUILD)/bundles/float-cache/manifest.json: $(STAMP)
	$(BIN)/gemma-export demo/tiny-gemma2 --target android --bits 8 --kv-bits 32 --context 128 --prefill-chunk 16 --verify none \
		-o $(@D) --force

# Bundles of another shape: three layers, windows of 8 and 24 tokens
$(ANDROID_BUILD)/bundles/random/manifest.json: PRESET := gemma2-2b
$(ANDROID_BUILD)/bundles/random-gemma3/manifest.json: PRESET := gemma3-4b
$(ANDROID_BUILD)/bundles/random/manifest.json $(ANDROID_BUILD)/bundles/random-gemma3/manifest.json: \
		$(STAMP) tools/kotlin_fixtures/random_checkpoint.py
	$(BIN)/python tools/kotlin_fixtures/random_checkpoint.py $(ANDROID_BUILD)/$(notdir $(@D)) $(PRESET)
	$(BIN)/gemma-export $(ANDROID_BUILD)/$(notdir $(@D)) --target android --bits 4 --method rtn --kv-bits 32 --context 24 --prefill-chunk 5 \
		--verify none -o $(@D) --force

# The APK with the demo's bundle in it. ORT_AAR=FILE takes ONNX Runtime's official AAR; SHRINK=1 shrinks the app with R8.
android: $(STAMP) $(BUNDLE)/manifest.json $(GEMMA)/.compiled
	$(BIN)/python tools/apk/build_apk.py $(BUNDLE) $(if $(ORT_AAR),--ort-aar $(ORT_AAR)) $(if $(SHRINK),--shrink)
