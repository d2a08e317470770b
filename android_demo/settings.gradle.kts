// These Gradle files are for Android Studio. Our own build and CI have no Gradle and never run them: `make android` builds the same
// APK without it. tests/test_gradle.py compares the versions, modules and names in these files with those of our build.
pluginManagement {
    repositories {
        google()
        mavenCentral()
        gradlePluginPortal()
    }
}

dependencyResolutionManagement {
    repositoriesMode = RepositoriesMode.FAIL_ON_PROJECT_REPOS
    repositories {
        google()
        mavenCentral()
    }
}

rootProject.name = "gemma-edge"
include(":gemma", ":gemma-executorch", ":gemma-litert", ":gemma-onnx", ":app")
