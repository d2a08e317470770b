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
ADAPTERS := $(ANDROID_BUILD)/adapters
ADAPTED := $(ANDROID_BUILD)/bundles/float-cache
FIXTURE_BUNDLES := $(BUNDLE) $(addprefix $(ANDROID_BUILD)/bundles/,float-cache random random-gemma3)

# Maven compiles the library's classes for the tests and for the APK.
GEMMA := android_demo/build/classes

.PHONY: aar aar-test android android-api android-lint android-sizes android-test android-native-test android-screenshots

POMS := $(wildcard android_demo/pom.xml android_demo/*/pom.xml android_demo/doubles/*/pom.xml)
GEMMA_SOURCES := $(shell find android_demo/gemma*/src/main android_demo/doubles -name '*.kt' -o -name '*.java')
GEMMA_TESTS := $(shell find android_demo/gemma*/src/test -name '*.kt')
# Maven leaves the classes of sources that are gone
CLEAN_GEMMA := rm -rf android_demo/gemma*/target/classes android_demo/gemma*/target/test-classes

$(GEMMA)/.compiled: $(POMS) $(GEMMA_SOURCES)
	$(CLEAN_GEMMA)
	$(MVN) -f android_demo/pom.xml compile
	@mkdir -p $(@D)
	@touch $@

$(GEMMA)/.tests-compiled: $(POMS) $(GEMMA_SOURCES) $(GEMMA_TESTS)
	$(CLEAN_GEMMA)
	$(MVN) -f android_demo/pom.xml test-compile
	@mkdir -p $(@D)
	@touch $(GEMMA)/.compiled $@

# One run of Maven compiles and tests, because it compiles everything again in each run.
android-test: $(FIXTURES)/.made
	rm -rf $(FIXTURES)/from-kotlin
	$(CLEAN_GEMMA)
	$(MVN) -f android_demo/pom.xml test
	@mkdir -p $(GEMMA)
	@touch $(GEMMA)/.compiled $(GEMMA)/.tests-compiled
	PYTHONPATH=src $(FIXTURE_PYTHON)/bin/python tools/kotlin_fixtures/check_states.py $(FIXTURES)
	$(BIN)/python tools/apk/test_app.py $(BUNDLE)

# Tests all engines on Android's own libraries, x86_64 and, under qemu, arm64. The .venv's Python packages give the answers.
NATIVE := $(ANDROID_BUILD)/native

android-native-test: $(FIXTURES)/.made $(NATIVE)/.made $(GEMMA)/.tests-compiled
	PYTHONPATH=tools/apk $(BIN)/python tools/native/run_tests.py $(NATIVE) $(BUNDLE)

$(NATIVE)/.made: $(EVERY_BACKEND)/manifest.json $(addprefix tools/kotlin_fixtures/,native_fixtures.py model_fixtures.py) \
		$(wildcard runtimes/engines/*.py)
	rm -rf $(NATIVE)
	$(BIN)/python tools/kotlin_fixtures/native_fixtures.py $(NATIVE) $(EVERY_BACKEND)
	@touch $@

# A Maven repository of the library. DOCS=1 adds the API docs, which take a minute. URL is the address of the project, for its POMs.
DOCS ?=
URL ?= https://example.org/gemma-edge
aar: $(STAMP) $(GEMMA)/.compiled
	$(BIN)/python tools/apk/build_aar.py $(ANDROID_BUILD)/repository $(URL) $(if $(DOCS),--docs)

# An app on the JVM that has that repository in its POM.
aar-test: aar $(FIXTURES)/.made
	$(BIN)/python tools/apk/test_aar.py $(ANDROID_BUILD)/repository $(BUNDLE) $(FIXTURES)/models/$(notdir $(BUNDLE))/answers.json

# Android Lint on the app's sources, resources and manifest.
android-lint: $(STAMP) $(GEMMA)/.compiled
	$(BIN)/python tools/apk/lint.py

# Takes the screenshots of docs/android: the tests of the screens draw them.
android-screenshots: $(FIXTURES)/.made $(GEMMA)/.compiled
	$(BIN)/python tools/apk/test_app.py $(BUNDLE) --screenshots docs/android

$(FIXTURES)/.made: $(FIXTURE_PYTHON)/.set-up $(FIXTURE_BUNDLES:=/manifest.json) $(ADAPTERS)/.made \
		$(wildcard tools/kotlin_fixtures/*fixtures.py)
	PYTHONPATH=src $(FIXTURE_PYTHON)/bin/python tools/kotlin_fixtures/fixtures.py $(FIXTURES) demo/tiny-gemma2 $(FIXTURE_BUNDLES) \
		--adapted $(ADAPTED) --adapters $(ADAPTERS)/made \
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

# Adapters of that bundle
$(ADAPTERS)/.made: $(ADAPTED)/manifest.json tools/kotlin_fixtures/random_adapters.py
	$(BIN)/python tools/kotlin_fixtures/random_adapters.py $(@D)/made $(ADAPTED) demo/tiny-gemma2
	@touch $@

# Bundles of another shape: three layers, windows of 8 and 24 tokens; only the first one keeps the beginning of a text
$(ANDROID_BUILD)/bundles/random/manifest.json: PRESET := gemma2-2b
$(ANDROID_BUILD)/bundles/random/manifest.json: PINNED := 20
$(ANDROID_BUILD)/bundles/random-gemma3/manifest.json: PRESET := gemma3-4b
$(ANDROID_BUILD)/bundles/random-gemma3/manifest.json: PINNED := 0
$(ANDROID_BUILD)/bundles/random/manifest.json $(ANDROID_BUILD)/bundles/random-gemma3/manifest.json: \
		$(STAMP) tools/kotlin_fixtures/random_checkpoint.py
	$(BIN)/python tools/kotlin_fixtures/random_checkpoint.py $(ANDROID_BUILD)/$(notdir $(@D)) $(PRESET)
	$(BIN)/gemma-export $(ANDROID_BUILD)/$(notdir $(@D)) --target android --bits 4 --method rtn --kv-bits 32 --context 24 --prefill-chunk 5 \
		--pinned $(PINNED) --verify none -o $(@D) --force

# The APK with the demo's bundle in it. ENGINES=onnx,executorch,tflite chooses the engines; ORT_AAR, EXECUTORCH_AAR and LITERT_AAR
# take their official AARs; SHRINK=1 shrinks the app with R8.
ENGINES ?= onnx
OFFICIAL := $(if $(ORT_AAR),--onnx-aar $(ORT_AAR)) $(if $(EXECUTORCH_AAR),--executorch-aar $(EXECUTORCH_AAR)) \
	$(if $(LITERT_AAR),--tflite-aar $(LITERT_AAR))
android: $(STAMP) $(BUNDLE)/manifest.json $(GEMMA)/.compiled
	$(BIN)/python tools/apk/build_apk.py $(BUNDLE) --engines $(ENGINES) $(OFFICIAL) $(if $(SHRINK),--shrink)

# The sizes of APKs for one ABI with one, two and three engines; each is checked as every APK is. SHRINK=1 shrinks them with R8.
android-sizes: $(STAMP) $(BUNDLE)/manifest.json $(GEMMA)/.compiled
	for engines in onnx executorch,onnx executorch,tflite,onnx; do \
		$(BIN)/python tools/apk/build_apk.py $(BUNDLE) --engines $$engines --abi arm64-v8a $(if $(SHRINK),--shrink) \
			--out $(ANDROID_BUILD)/gemma-edge-$$engines$(if $(SHRINK),-shrunk).apk || exit 1; \
	done

# Compares the doubles that the modules are compiled against with official files: EXECUTORCH_AAR=FILE, LITERT_AAR=FILE.
android-api: $(STAMP) $(GEMMA)/.compiled
	$(if $(EXECUTORCH_AAR)$(LITERT_AAR),,$(error give EXECUTORCH_AAR=FILE, LITERT_AAR=FILE or both))
	$(if $(EXECUTORCH_AAR),$(BIN)/python tools/apk/check_api.py executorch $(EXECUTORCH_AAR))
	$(if $(LITERT_AAR),$(BIN)/python tools/apk/check_api.py litert $(LITERT_AAR))
