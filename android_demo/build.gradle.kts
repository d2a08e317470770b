// Not run in CI, see settings.gradle.kts.
buildscript {
    dependencies {
        classpath(libs.kotlin.gradle.plugin) // in place of the older one that the Android plugin brings
    }
}

plugins {
    alias(libs.plugins.android.application) apply false
    alias(libs.plugins.android.library) apply false
}
