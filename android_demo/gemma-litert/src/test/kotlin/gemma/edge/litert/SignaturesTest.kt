package gemma.edge.litert

import gemma.edge.Signature
import org.junit.Assert.assertEquals
import org.junit.Test

class SignaturesTest {
    private val long = listOf(Signature("prefill_128", true, 128, null), Signature("prefill_16", true, 16, null), Signature("decode", false, 1, null))
    private val short = listOf(Signature("short_128", true, 128, 128), Signature("short_16", true, 16, 128), Signature("short_1", false, 1, 128))

    private fun calls(position: Int, count: Int, signatures: List<Signature> = long + short) =
        Signatures(signatures).calls(position, count).map { "${it.signature.name}: ${it.count} from ${it.start}" }

    @Test
    fun the_last_token_is_decoded_and_the_rest_prefilled() {
        assertEquals(listOf("short_1: 1 from 0"), calls(0, 1))
        assertEquals(listOf("short_128: 127 from 0", "short_1: 1 from 127"), calls(0, 128))
        assertEquals(listOf("prefill_16: 9 from 0", "decode: 1 from 9"), calls(200, 10))
        assertEquals(listOf("decode: 1 from 0", "decode: 1 from 1"), calls(200, 2))
    }

    @Test
    fun a_long_text_is_worked_off_in_the_shortest_time() {
        assertEquals(listOf("prefill_128: 128 from 0", "prefill_16: 16 from 128", "prefill_16: 5 from 144", "decode: 1 from 149"), calls(0, 150, long))
    }

    @Test
    fun no_call_goes_on_behind_the_pinned_tokens() {
        val calls = { position: Int, count: Int, pinned: Int -> Signatures(long).calls(position, count, pinned).map { it.start to it.count } }
        assertEquals(listOf(0 to 9, 9 to 16, 25 to 16, 41 to 8, 49 to 1), calls(0, 50, 9))
        assertEquals(listOf(0 to 2, 2 to 16, 18 to 16, 34 to 8, 42 to 1), calls(7, 43, 9))
        assertEquals("all are pinned", listOf(0 to 9, 9 to 1), calls(0, 10, 10))
        assertEquals("they were fed before", calls(9, 50, 0), calls(9, 50, 9))
    }

    @Test
    fun a_signature_for_short_texts_is_left_in_time() {
        assertEquals(listOf("short_16: 16 from 0", "short_16: 11 from 16", "short_1: 1 from 27"), calls(100, 28))
        assertEquals("the last token lies at position 128", "decode: 1 from 28", calls(100, 29).last())
    }
}
