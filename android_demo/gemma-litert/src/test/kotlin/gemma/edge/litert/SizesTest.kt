package gemma.edge.litert

import com.google.ai.edge.litert.TensorType
import org.junit.Assert.assertEquals
import org.junit.Assert.assertNull
import org.junit.Test

class SizesTest {
    /** As in the releases of LiteRT whose layouts have lists. */
    class ListLayout(val dimensions: List<Int>)

    @Test
    fun sizes_are_read_as_an_array_and_as_a_list() {
        assertEquals(listOf(1, 16), sizesOf(TensorType.Layout(intArrayOf(1, 16))))
        assertEquals(listOf(1, 16), sizesOf(ListLayout(listOf(1, 16))))
        assertNull(sizesOf(null))
    }
}
