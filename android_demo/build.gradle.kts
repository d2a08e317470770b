// CI does not run this file; see settings.gradle.kts.
buildscript {
    dependencies {
        classpath(libs.kotlin.gradle.plugin) // newer than the version that the Android plugin brings
    }
}

plugins {
    alias(libs.plugins.android.application) apply false
    alias(libs.plugins.android.library) apply false
}
