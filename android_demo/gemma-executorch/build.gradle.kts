// Runs ExecuTorch backends, from the same sources as pom.xml. CI does not run this file; see settings.gradle.kts.
plugins {
    alias(libs.plugins.android.library)
}

android {
    namespace = "gemma.edge.executorch"
    compileSdk = libs.versions.compile.sdk.get().toInt()
    defaultConfig {
        minSdk = libs.versions.min.sdk.get().toInt()
        consumerProguardFiles("consumer-rules.pro")
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

kotlin {
    explicitApi()
    compilerOptions { optIn.add("gemma.edge.engine.EngineApi") }
}

dependencies {
    api(project(":gemma"))
    implementation(libs.executorch.android)
}
