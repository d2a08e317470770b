// CI does not run this file; see settings.gradle.kts.
plugins {
    alias(libs.plugins.android.application)
}

// The model that comes with the app; `make demo` exports it.
val demo = tasks.register<Sync>("demo") {
    from(rootDir.resolve("../out/tiny-gemma2"))
    into(layout.buildDirectory.dir("demo/tiny-gemma2"))
}
tasks.named("preBuild") { dependsOn(demo) }

android {
    namespace = "gemma.edge.app"
    compileSdk = libs.versions.compile.sdk.get().toInt()
    defaultConfig {
        applicationId = "gemma.edge.app"
        minSdk = libs.versions.min.sdk.get().toInt()
        targetSdk = libs.versions.target.sdk.get().toInt()
        versionCode = 1
        versionName = "0.1.0"
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
    }
    buildTypes {
        release {
            isMinifyEnabled = true
            proguardFiles(getDefaultProguardFile("proguard-android-optimize.txt"), "proguard-rules.pro")
        }
    }
    buildFeatures { viewBinding = true } // our own build generates the same classes with tools/apk/bindings.py
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
    sourceSets["main"].assets.srcDir(layout.buildDirectory.dir("demo"))
}

dependencies {
    implementation(project(":gemma"))
    implementation(project(":gemma-onnx"))
    implementation(libs.activity)
    implementation(libs.appcompat)
    implementation(libs.core)
    implementation(libs.coroutines.android)
    implementation(libs.documentfile)
    implementation(libs.lifecycle.runtime)
    implementation(libs.lifecycle.viewmodel)
    implementation(libs.lifecycle.viewmodel.savedstate)
    implementation(libs.material)
    implementation(libs.recyclerview)
    testImplementation(libs.junit)
    testImplementation(libs.robolectric)
    testImplementation(libs.onnxruntime.desktop) // the classes of the AAR, with native libraries for desktops
}
