// For Android Studio. Not run in CI: the mirror has no Gradle. `make android` builds the same APK without it; tests/test_gradle.py
// compares these files with what is built.
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
include(":gemma", ":app")
