package gemma.edge.executorch

import gemma.edge.engine.Flatbuffer
import gemma.edge.engine.ProgramFile
import gemma.edge.engine.tag
import java.nio.ByteBuffer

private const val HEADER_BYTES = 40
private const val IN_SEGMENT = 1L // DataLocation.SEGMENT

/**
 * Follow every offset and index of a program, some of which ExecuTorch takes unchecked, which can end the process.
 * runtimes/engines/structure/pte.py does the same. Source: ExecuTorch's schema/program.fbs and schema/extended_header.h.
 *
 * @throws gemma.edge.BundleException one leads nowhere.
 */
internal fun checkProgram(file: ProgramFile) {
    val header = file.beginning(HEADER_BYTES)
    if (header.tag(4) != "ET12" || header.tag(8) != "eh00") file.refuse("it is not an ExecuTorch program")
    val (size, segments) = header.getLong(16) to header.getLong(24)
    if (header.getInt(12) < 24 || size < HEADER_BYTES || size > segments || segments > file.bytes || size > Int.MAX_VALUE) {
        file.refuse("its header does not fit its size")
    }
    file.check { Program(file.beginning(size.toInt()), size, file.bytes - segments).check("Program") }
}

private class Program(data: ByteBuffer, size: Long, private val segments: Long) : Flatbuffer(data, size, SCHEMA, UNIONS) {
    /** Segments must end inside the file, and delegates must name segments that exist. */
    override fun checkTable(name: String, numbers: Map<Int, Long>) {
        if (name == "DataSegment" && outside(numbers[0] ?: 0, numbers[1] ?: 0, segments)) damaged("a segment lies behind the end of the file")
        val inSegment = name == "Reference" && numbers[0] == IN_SEGMENT
        if (inSegment && (numbers[1] ?: 0) >= (counts["DataSegment"] ?: 0)) damaged("a delegate names a segment that is not there")
    }
}

private val SCHEMA: Map<String, List<String?>> = mapOf(
    "Program" to listOf(
        "4", "[ExecutionPlan]", "[Buffer]", "[Buffer]", "[DataSegment]", "Subsegments", "[Subsegments]",
        "[NamedData]",
    ),
    "ExecutionPlan" to listOf(
        "s", "Container", "[EValue]", "[4]<EValue", "[4]<EValue", "[Chain]", "[Operator]", "[BackendDelegate]",
        "[8]", "[Device]",
    ),
    "Container" to listOf("s", "s"),
    "EValue" to listOf("1", "?0"),
    "Int" to listOf("8"),
    "Bool" to listOf("1"),
    "Tensor" to listOf("1", "4", "[4]", "[1]", "1", "4", "Allocation", "1", "1", "Extra"),
    "Allocation" to listOf("4", "4", "4"),
    "Extra" to listOf("8", "s", "1", "1", "1"),
    "String" to listOf("s"),
    "Longs" to listOf("[8]"),
    "Bools" to listOf("[1]"),
    "Indices" to listOf("[4]"),
    "Chain" to listOf("[4]<EValue", "[4]<EValue", "[Instruction]", "[FrameList]"),
    "Instruction" to listOf("1", "?0"),
    "KernelCall" to listOf("4<Operator", "[4]<EValue"),
    "DelegateCall" to listOf("4<BackendDelegate", "[4]<EValue"),
    "MoveCall" to listOf("4<EValue", "4<EValue"),
    "JumpFalseCall" to listOf("4<EValue", "4<Instruction"),
    "FreeCall" to listOf("4<EValue"),
    "FrameList" to listOf("[Frame]"),
    "Frame" to listOf("s", "4", "s", "s"),
    "Operator" to listOf("s", "s"),
    "BackendDelegate" to listOf("s", "Reference", "[CompileSpec]"),
    "Reference" to listOf("1", "4"),
    "CompileSpec" to listOf("s", "[1]"),
    "Device" to listOf("4", "1", "1"),
    "Buffer" to listOf("[1]"),
    "DataSegment" to listOf("8", "8"),
    "Subsegments" to listOf("4", "[8]"),
    "NamedData" to listOf("s", "4<DataSegment"),
    "nothing" to emptyList(),
)

private val UNIONS = mapOf(
    "EValue.1" to mapOf(
        1L to "nothing", 2L to "Int", 3L to "Bool", 4L to "Int", 5L to "Tensor", 6L to "String", 7L to "Longs",
        8L to "Longs", 9L to "Bools", 10L to "Indices", 11L to "Indices",
    ),
    "Instruction.1" to mapOf(
        1L to "KernelCall", 2L to "DelegateCall", 3L to "MoveCall", 4L to "JumpFalseCall", 5L to "FreeCall",
    ),
)
