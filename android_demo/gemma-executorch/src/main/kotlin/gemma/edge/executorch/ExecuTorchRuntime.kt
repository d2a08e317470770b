package gemma.edge.executorch

import gemma.edge.Backend
import gemma.edge.Bundle
import gemma.edge.BundleException
import gemma.edge.GemmaRuntime
import gemma.edge.engine.ChunkedRuntime
import gemma.edge.engine.Engine
import gemma.edge.engine.EngineLibrary
import gemma.edge.engine.EngineOptions
import gemma.edge.engine.ProgramFile
import gemma.edge.engine.SavedCache
import gemma.edge.engine.noNativeLibrary
import java.io.File
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/** ExecuTorch, through its Java API. */
public class ExecuTorchEngine : Engine {
    override fun open(bundle: Bundle, backend: Backend, options: EngineOptions): GemmaRuntime {
        val file = ProgramFile(bundle, backend)
        checkProgram(file)
        file.checkHash() // the Java API cannot have ExecuTorch verify a program, and it ends the process where a number is wrong
        try {
            return ExecuTorchRuntime(bundle, backend, loaded(file.path, options.threads))
        } catch (error: LinkageError) {
            throw noNativeLibrary("ExecuTorch", error)
        }
    }

    private fun loaded(program: File, threads: Int): Module = try {
        Module.load(program.path, Module.LOAD_MODE_MMAP, threads).also { it.loadMethod(METHOD) }
    } catch (error: RuntimeException) {
        throw BundleException("$program is damaged or is not the program of this bundle: ${oneLine(error)}; import the bundle again", error)
    }
}

/**
 * Runs a bundle's ExecuTorch backend on the CPU. The cache is inside the program, a ring without an end, and Java cannot reach it;
 * therefore a saved state holds the tokens only. ExecuTorch ends the process where other libraries throw: everything it is given was
 * checked before. The program is described in docs/export/executorch.md.
 */
internal class ExecuTorchRuntime(bundle: Bundle, backend: Backend, private val module: Module) : ChunkedRuntime(bundle, backend) {
    private var output: Tensor? = null // native memory that the next call overwrites

    override val library = EngineLibrary("executorch", "")

    override val savedCache: SavedCache? get() = null

    override fun forward(ids: IntArray, start: Int, end: Int) {
        val tokens = LongArray(end - start) { ids[start + it].toLong() }
        val inputs = arrayOf(tensor(tokens, 1, tokens.size.toLong()), tensor(longArrayOf(position + pinned * PINNED_UNIT), 1))
        output = try {
            module.execute(METHOD, *inputs).single().toTensor()
        } catch (error: RuntimeException) {
            throw BundleException("${bundle.folder}/${backend.program} does not run: ${oneLine(error)}; import the bundle again", error)
        }
    }

    override fun logits(): FloatArray {
        val copy = checkNotNull(output).dataAsFloatArray
        if (copy.size != bundle.vocabSize) {
            throw BundleException("${bundle.folder}/${backend.program} gives ${copy.size} logits, the vocabulary has ${bundle.vocabSize}; export it again")
        }
        return copy
    }

    override fun free() {
        output = null
        module.close()
    }

    private fun tensor(data: LongArray, vararg shape: Long) = EValue.from(Tensor.fromBlob(data, shape))
}

private const val METHOD = "forward"

// PINNED_UNIT: what the program's position holds for each pinned token, as in bundle/geometry.py.
private const val PINNED_UNIT = 1L shl 32

/** The first line of an error of the library, whose messages hold its log. */
internal fun oneLine(error: Throwable): String = error.message.orEmpty().lineSequence().firstOrNull { it.isNotBlank() } ?: error.toString()
